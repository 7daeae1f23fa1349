"""A save that is killed, or whose disk fails, at each of the calls that it makes on files.

For a process into which `disk.c` is preloaded: tests/faults/test_events.py starts it.
"""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from mmcore import checkpoint, distributed
from mmcore import checkpoint_files as files
from mmcore.config import ParallelConfig
from tests import ranks, tiny
from tests.faults import disk
from tests.faults.chain import LAST, RANKS, Chain, sums
from tests.faults.jobs import small
from tests.faults.size import SIZE, spread
from tests.training.test_saving import Run

PAIR = ParallelConfig(tensor_model_parallel_size=2)


def armed(victim: int, run: Path, number: int = 0, log: str = "", *, start: bool = False) -> Callable[[int], None]:
    """Let a rank's n-th call kill it, or note all calls: of its first save and what follows it, up to the next; or of
    its start, up to the first, where it is killed at the latest."""

    def before(rank: int) -> None:
        begin, begun = checkpoint.Saving.__init__, []
        arm = partial(disk.arm, run, disk.CHANGES, number, log=log)

        def counted(*args: Any, **kwargs: Any) -> None:
            begun.append(True)
            if start:
                disk.disarm()
                os.kill(os.getpid(), signal.SIGKILL)
            if len(begun) == 1:
                arm()
            elif len(begun) == 2:
                disk.disarm()
            begin(*args, **kwargs)

        if rank == victim:
            checkpoint.Saving.__init__ = counted  # type: ignore[method-assign]
            if start:
                arm()

    return before


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_killed_at_every_event(async_save: bool, inputs: Path, whole: Path, tmp_path: Path, tell: Any) -> None:
    """Of each of two ranks, while they save and while they start; a write is torn in its middle."""
    chain, log = Chain(inputs, tmp_path, whole, async_save=async_save), tmp_path / "events"
    chain.live_on(2)
    for folder in files.step_folders(chain.run)[:-1]:  # it may have been killed before it deleted the first
        shutil.rmtree(folder)
    chain.live_on(2, lambda rank: armed(rank, chain.run, log=f"{log}-{rank}")(rank))
    killed = 0
    for rank in range(RANKS):
        events = lines(Path(f"{log}-{rank}"))
        for number in spread(len(events), SIZE.events):
            if not 0 < chain.newest <= LAST:  # its next save is to have one to delete, as when calls were noted
                chain.live_on(2)
            before = chain.newest
            job = chain.life(lambda job: job.wait(patience=0), armed(rank, chain.run, number))
            assert job.ended[rank] == -signal.SIGKILL, (events[number - 1], job.said(rank))
            assert chain.newest in (before, before + 1), events[number - 1]
            killed += 1
    if chain.newest > LAST:
        chain.live_on(1)
    # It is killed with half a checkpoint and half a row, which the next start is to clear away.
    chain.life(lambda job: job.wait(patience=0), armed(0, chain.run, 100))
    (chain.run / ".log.jsonl.4242").write_text("half of a")
    shutil.copytree(chain.run, tmp_path / "torn")

    def start(number: int = 0) -> None:
        shutil.rmtree(chain.run)
        shutil.copytree(tmp_path / "torn", chain.run)
        job = chain.life(lambda job: job.wait(patience=0), armed(0, chain.run, number, str(log), start=True))
        assert job.ended[0] == -signal.SIGKILL, job.said()

    start()
    for number in spread(len(lines(log)), SIZE.events):
        start(number)
        killed += 1
    chain.finish()
    mode = "in the background" if async_save else "at once"
    tell(
        "kill at every file event",
        f"saving {mode}, {killed} events: nothing lost or changed, at most {chain.lost} steps done again",
    )


FAILURES = {
    "EIO once": (disk.ANY, errno.EIO, False),
    "EIO for ever": (disk.ANY, errno.EIO, True),
    "ENOSPC for ever": (disk.GROWS, errno.ENOSPC, True),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_disk_fails_at_every_event(kind: str, tmp_path: Path, tell: Any) -> None:
    """Of each of two ranks: both hear of it, and what is published is whole and no other than it was."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "words").write_text("one two")
    kinds, error, lasts = FAILURES[kind]

    def save() -> list[tuple[str, str]]:
        with mock.patch.object(tiny, "build", partial(tiny.build, arch=small(tiny.LANGUAGE.vocab_size))):
            run = Run(PAIR, tmp_path, keep_last=1)
        run.save(1).finish()
        step, found = 2, []
        own = distributed.Rank.from_environment().rank
        log = tmp_path / "events"
        disk.arm(tmp_path, kinds)
        run.save(step).finish()
        counts: list[Any] = [None] * RANKS
        dist.all_gather_object(counts, disk.disarm())
        for victim, count in enumerate(counts):
            for number in spread(count, SIZE.faults):
                before = {path: sums(path) for path in files.step_folders(tmp_path)}
                step, told = step + 1, ""
                run.config = replace(run.config, async_save=step % 2 == 1)
                if distributed.is_main():
                    files.clear_incomplete(tmp_path)
                dist.barrier()
                if own == victim:
                    disk.arm(tmp_path, kinds, number, error, lasts=lasts, log=str(log))
                try:
                    run.save(step).finish()
                except checkpoint.SaveError as failure:
                    told = str(failure)
                disk.disarm()
                dist.barrier()
                event = f"rank {victim}, {lines(log)[number - 1]}"
                after = {path: sums(path) for path in files.step_folders(tmp_path)}
                assert after and not any(files.verify(path) for path in after), event
                new = files.step_folder(tmp_path, step)
                assert all(before.get(path, content) == content for path, content in after.items()), event
                assert new in after or after == before, event
                assert told or new in after, event  # what fails right after the new name was given is told, too
                # Where a folder's closing fails, Python closes it again, and tells of that.
                said = {f"[Errno {error}]", *([f"[Errno {errno.EBADF}]"] if " close " in event else [])}
                assert not told or (any(one in told for one in said) and "Traceback" not in told), told
                found.append((event, told))
        return found

    results = ranks.run(save, PAIR, RANKS, timeout=3000)
    assert results[0] == results[1]
    harmless = [event.split()[3:] for event, told in results[0] if not told]
    for call, *path in harmless:  # a folder that is there, and a copy that goes on in another way
        assert call == "sendfile" or (call == "mkdir" and (not path or "tokenizer" not in path[0])), (call, path)
    failed = len(results[0]) - len(harmless)
    tell(
        "a save never hangs",
        f"{kind}: {failed} saves failed on both ranks, and {len(harmless)} were none the worse; what was published "
        "before, and all that is, is whole",
    )
