"""A save that cannot succeed ends on all ranks, soon, with an error; the checkpoint before it is as it was."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.msc_utils import MultiStorageClientFeature

from mmcore import checkpoint, distributed
from mmcore import checkpoint_files as files
from mmcore.checkpoint_shards import Shards
from mmcore.config import ParallelConfig
from tests import ranks
from tests.faults.chain import RANKS, STEPS, log, sums
from tests.faults.jobs import Job, arguments
from tests.faults.size import SIZE
from tests.training.test_saving import Run, names

PAIR = ParallelConfig(tensor_model_parallel_size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "words").write_text("one two")
    return tmp_path


@contextmanager
def killed_thread(owner: Any, name: str) -> Iterator[list[str]]:
    """The first thread that calls a function is ended there, by what nothing catches; its name is noted."""
    killed: list[str] = []

    def end(*args: Any) -> Any:
        if killed:
            return real(*args)
        killed.append(threading.current_thread().name)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(SystemExit))
        while True:
            time.sleep(0)

    real = getattr(owner, name)
    with mock.patch.object(owner, name, end):
        yield killed


def test_each_writer_killed(folder: Path) -> None:
    """The thread that writes a rank's files, one of those that each write one, and the one that waits for them."""

    def save() -> list[tuple[list[str], str]]:
        found = []
        for async_save in (False, True):
            run = Run(PAIR, folder, async_save=async_save)
            run.save(1).finish()
            for victim in (0, 1):
                for owner, name in (
                    (Shards, "write"),
                    (FileSystemWriterAsync, "write_preloaded_data"),
                    (files, "checksum"),
                ):
                    is_victim = victim == int(os.environ["RANK"])
                    with killed_thread(*((owner, name) if is_victim else (time, "ctime"))) as killed:
                        with pytest.raises(checkpoint.SaveError) as raised:
                            run.save(2).finish()
                        found.append((killed, str(raised.value)))
                    assert not distributed.is_main() or names(folder) == ["step_00000001"]
        return found

    results = ranks.run(save, PAIR, 2)
    assert len(results[0]) == 12
    for index, ((killed, told), (other_killed, other_told)) in enumerate(zip(*results, strict=True)):
        assert told == other_told and f"rank {index // 3 % 2}: its writer was ended" in told
        (thread,) = killed or other_killed
        assert thread.startswith(("saving step_00000002", "ThreadPoolExecutor"))
    assert files.verify(folder / "step_00000001") == []


def test_writes_go_through_no_other_client(folder: Path) -> None:
    """With NVIDIA's multi-storage client, which energon brings, megatron-core would write through it where it is found:
    neither a save nor a load does, so there is no second mode that could fail otherwise."""
    client = pytest.importorskip("multistorageclient")
    assert not MultiStorageClientFeature.is_enabled()

    def save() -> None:
        refuse = mock.Mock(side_effect=AssertionError("through the client"))
        with mock.patch.object(client, "open", refuse), mock.patch.object(client, "StorageClient", refuse):
            run = Run(ParallelConfig(), folder)
            run.save(1).finish()
            run.resume()

    ranks.run(save, ParallelConfig(), 1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MB: of a run's checkpoints of 0.6 MB each there are never more than two."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def filled(place: Path) -> Any:
    """What a job does first: fill its disk but for 64 KB when the main rank begins its second save."""

    def before(rank: int) -> None:
        begin, begun = checkpoint.Saving.__init__, []

        def late(*args: Any, **kwargs: Any) -> None:
            begun.append(True)
            if len(begun) == 2:
                usage = os.statvfs(place)
                (place / "ballast").write_bytes(bytes(usage.f_bavail * usage.f_bsize - (64 << 10)))
            begin(*args, **kwargs)

        if rank == 0:
            checkpoint.Saving.__init__ = late  # type: ignore[method-assign]

    return before


@pytest.mark.parametrize("async_save", [False, True][: 1 + SIZE.launched])
def test_disk_without_room(async_save: bool, inputs: Path, whole: Path, disk: Path, tmp_path: Path, tell: Any) -> None:
    """The command itself, two ranks: both end soon by code 1, and go on when there is room."""
    run, notes = disk / "run", tmp_path / "notes"
    given = arguments(inputs, run, STEPS, "--checkpoint.keep-last", 1, *["--checkpoint.async-save"] * async_save)
    job = Job(given, RANKS, notes, filled(disk))
    assert job.wait(patience=60) == {0: 1, 1: 1}, job.said() + job.said(1)
    seconds = max(job.seconds.values()) - (disk / "ballast").stat().st_mtime + time.time() - time.monotonic()
    assert "No space left on device" in job.said() and "step_00000001 is the newest one that is whole" in job.said()
    assert sums(run / "step_00000001") == sums(files.step_folder(whole, 1))
    (disk / "ballast").unlink()
    assert Job(given, RANKS, notes).wait() == {0: 0, 1: 0}
    assert log(run) == log(whole)
    tell("a save never hangs", f"a tmpfs without room: all ranks ended by code 1 within {seconds:.0f} s")


@pytest.mark.skipif(not SIZE.launched, reason="torchrun is started by the full form")
@pytest.mark.parametrize("victim", range(RANKS))
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_rank_killed_under_torchrun(
    async_save: bool, victim: int, inputs: Path, whole: Path, tmp_path: Path, tell: Any
) -> None:
    """In the middle of a save: the job ends soon, none of its processes is left, and what was published is whole."""
    run = tmp_path / "run"
    given = arguments(inputs, run, 1000, "--checkpoint.keep-last", 1, *["--checkpoint.async-save"] * async_save)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    with subprocess.Popen([*launch, "-m", "mmcore", "train", *given], stderr=subprocess.DEVNULL) as process:
        while not any(run.glob("step_*")) or not (run / f"{files.INCOMPLETE}{newest(run)}").exists():
            assert process.poll() is None
            time.sleep(0.001)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        of_rank = {environment(pid)["RANK"]: int(pid) for pid in children if "RANK" in environment(pid)}
        started = time.monotonic()
        os.kill(of_rank[str(victim)], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        seconds = time.monotonic() - started
    assert not any(Path(f"/proc/{pid}").exists() for pid in of_rank.values())
    found = files.step_folders(run)
    assert found and not any(files.verify(folder) for folder in found)
    tell("a save never hangs", f"rank {victim} killed in it, under torchrun: the job ended within {seconds:.0f} s")


def newest(run: Path) -> str:
    """The name of the checkpoint that is to come after the newest."""
    return files.step_folder(run, int(files.step_folders(run)[-1].name[5:]) + 1).name


def environment(pid: str) -> dict[str, str]:
    content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(entry.split("=", 1) for entry in content.split("\0") if "=" in entry)
