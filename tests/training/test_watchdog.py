"""What hangs is named, with the Python stacks of all ranks, and the job ends."""

import ctypes
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mmcore import checkpoint
from mmcore import checkpoint_files as files
from mmcore.config import ParallelConfig
from mmcore.data import stream
from mmcore.evaluation.run_files import read_rows
from mmcore.models.llava import LlavaModel
from mmcore.training import step, watchdog
from tests import ranks
from tests.training import operated

LIMIT = 3.0
THREE = ("--data.num-streams", 3, "--train.global-batch-size", 3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: Any) -> Path:
    return operated.write_inputs(tmp_path_factory.mktemp("inputs"))


def hanging(inputs: Path, run: Path, hang: Callable[[], None], *options: object) -> None:
    """A rank of a job in which something will hang. Ends the process by itself."""
    watchdog.GRACE = 5.0
    hang()
    operated.train(inputs, run, "--train.watchdog-minutes", LIMIT / 60, *options)


def ended(inputs: Path, run: Path, hang: Callable[[], None], *options: object, world_size: int = 2) -> str:
    """What a hanging job leaves, once it has ended itself with code 1."""
    layout = ParallelConfig()
    before = time.monotonic()
    with pytest.raises(AssertionError, match="or killed"):
        ranks.run(hanging, layout, world_size, inputs, run, hang, *options, timeout=100)
    assert time.monotonic() - before < 90
    (file,) = run.glob("hang-*.txt")
    (end,) = read_rows(run / "ends.jsonl")
    assert end["code"] == 1 and end["reason"] == file.read_text().splitlines()[0]
    return file.read_text()


def sleeps_in_its_third_forward_pass() -> None:
    """On rank 1, in the projector; rank 0 will wait for its gradients."""
    if os.environ["RANK"] != "1":
        return
    calls, forward = [0], LlavaModel.forward

    def called(self: Any, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            self.vision_projection.register_forward_pre_hook(lambda *_: time.sleep(1e4))
        return forward(self, *args, **options)

    LlavaModel.forward = called  # type: ignore[method-assign]


def test_a_rank_that_hangs(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    text = ended(inputs, run, sleeps_in_its_third_forward_pass)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "hangs" in line]
    assert re.match(
        r"mmcore train: step 2 hangs, nothing has moved for \d+ s: rank 1 \(\S+\): in micro batch 1 of 2, at "
        r"\S*vision_projection\S*; rank 0 \(\S+\): in \w+, at .*, waiting for gloo:\w+ .* number \d+ of "
        r"DATA_PARALLEL_GROUP\w*, with the samples \d{8}\. The Python stacks of all ranks are in "
        + re.escape(str(run / "hang-2.txt")),
        line,
    ), line
    assert text.count("--- rank 1") == text.count("--- rank 0") == 2 and "time.sleep(1e4)" in text
    assert "all_reduce" in text and not list(run.glob("step_*"))


def sleeps_before_a_collective() -> None:
    """On rank 1, before the second step's norm is summed."""
    calls, squared_norm = [0], step.squared_norm

    def called(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 and os.environ["RANK"] == "1":
            time.sleep(1e4)
        return squared_norm(*args)

    step.squared_norm = called


def test_a_collective_that_hangs(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    text = ended(inputs, tmp_path / "run", sleeps_before_a_collective, *THREE, world_size=3)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "hangs" in line]
    assert re.search(
        r"rank 1 \(\S+\): in optimizer, at mmcore/training/step\.py:\d+ train_step; ranks 0, 2: in optimizer, at "
        r"mmcore/training/step\.py:\d+ squared_norm, waiting for gloo:all_reduce \[\[2\]\]",
        line,
    ), line
    assert "time.sleep(1e4)" in text


def a_sample_that_is_never_there() -> None:
    """For the loader of rank 0."""
    calls, encode = [0], stream.encode_sample

    def called(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5 and os.environ["RANK"] == "0":
            time.sleep(1e4)
        return encode(*args)

    stream.encode_sample = called


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_hangs(num_workers: int, inputs: Path, tmp_path: Path, capfd: Any) -> None:
    text = ended(inputs, tmp_path / "run", a_sample_that_is_never_there, "--data.num-workers", num_workers)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "hangs" in line]
    who = r"worker \d" if num_workers else "this process"
    assert re.search(
        rf"rank 0 \(\S+\): in .*, at .*, while {who} reads \S+\.tar, sample \d+; rank 1 .*, waiting for", line
    ), line
    assert "time.sleep(1e4)" in text or "in called" in text


def a_disk_that_does_not_answer() -> None:
    """To rank 1; the other waits for its share of the checkpoint, without a limit of its own."""
    watchdog.SAVING = 1.0
    if os.environ["RANK"] == "1":
        checkpoint.Saving._write = lambda self: time.sleep(1e4)  # type: ignore[method-assign]


def test_a_save_that_hangs(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    ended(inputs, tmp_path / "run", a_disk_that_does_not_answer, "--checkpoint.save-interval", 1)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "hangs" in line]
    assert re.search(r"rank 1 \(\S+\): in saving, at mmcore/checkpoint\.py:\d+ finish\W", line), line
    assert not list((tmp_path / "run").glob("step_*"))


def the_interpreter_itself() -> None:
    """Of rank 1: none of its threads comes to say anything."""
    if os.environ["RANK"] == "1":
        step.squared_norm = lambda *_: ctypes.PyDLL(None).sleep(10_000)


def test_a_rank_that_cannot_speak(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    ended(inputs, tmp_path / "run", the_interpreter_itself)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "hangs" in line]
    assert re.search(r"hangs, nothing has moved for \d+ s: rank 1: no answer; rank 0 \(\S+\): in optimizer", line), line


def test_the_first_rank_cannot_speak(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    """One of the others speaks in its place, for all."""

    def stuck() -> None:
        if os.environ["RANK"] == "0":
            step.squared_norm = lambda *_: ctypes.PyDLL(None).sleep(10_000)

    text = ended(inputs, tmp_path / "run", stuck, *THREE, world_size=3)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "hangs" in line]
    assert re.search(r"for \d+ s: rank 0: no answer; ranks 1, 2: in optimizer, at ", line), line
    assert text.count("--- rank 1") == text.count("--- rank 2") == 2


def test_a_loader_that_is_slow_is_let_be(inputs: Path, tmp_path: Path) -> None:
    """A row may take longer than the limit, if its samples come one after the other."""
    encode = stream.encode_sample

    def slowly(*args: Any) -> Any:
        time.sleep(0.3 * LIMIT)
        return encode(*args)

    def job() -> int:
        stream.encode_sample = slowly
        few = ("--train.steps", 1, "--train.global-batch-size", 1, "--data.num-streams", 1, "--data.seq-length", 128)
        few += ("--data.packing-buffer-size", 4, "--optimizer.lr-warmup-steps", 0)
        return operated.train(inputs, tmp_path / "run", "--train.watchdog-minutes", LIMIT / 60, *few)

    started = time.monotonic()
    assert ranks.run(job, ParallelConfig(), 1) == [0]
    assert time.monotonic() - started > LIMIT


def test_going_back_is_let_be(inputs: Path, tmp_path: Path) -> None:
    """A rewind, whose checkpoint takes its time to be read: longer than the limit, and shorter than six of it."""
    checksum, answered = files.checksum, [False]

    def slowly(path: Path) -> Any:
        if answered[0]:
            time.sleep(2 * LIMIT)
            answered[0] = False
        return checksum(path)

    def spoiled(*args: Any, **window: Any) -> Any:
        calls[0] += 1
        total, weight, told = token_loss(*args, **window)
        if calls[0] == 6 * 2:
            answered[0] = True
            total = total * float("nan")
        return total, weight, told

    calls, token_loss = [0], step.token_loss

    def job() -> int:
        files.checksum, step.token_loss = slowly, spoiled
        options = ("--train.on-bad-step", "rewind", "--train.replica-check-interval", 0)
        return operated.train(inputs, tmp_path / "run", "--train.watchdog-minutes", LIMIT / 60, *options)

    assert ranks.run(job, ParallelConfig(), 2, timeout=120) == [0, 0]
    assert not list((tmp_path / "run").glob("hang*"))


def test_work_that_goes_on_is_let_be(inputs: Path, tmp_path: Path) -> None:
    """Ranks that wait for others that write; a scorer."""
    write = checkpoint.Saving._write

    def slowly(self: Any) -> None:
        end = time.monotonic() + 3 * LIMIT
        with (self.folder / "written").open("w", buffering=1) as file:
            while time.monotonic() < end and dist.get_rank() == 0:
                file.write("x\n")
                time.sleep(0.05)
        (self.folder / "written").unlink()
        write(self)

    def job() -> int:
        watchdog.SAVING = 1.0
        checkpoint.Saving._write = slowly  # type: ignore[method-assign]
        return operated.train(inputs, tmp_path / "run", "--train.watchdog-minutes", LIMIT / 60, "--train.steps", 3)

    assert ranks.run(job, ParallelConfig(), 2) == [0, 0]
    assert not list((tmp_path / "run").glob("hang*"))
