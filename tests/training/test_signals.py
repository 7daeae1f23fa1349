"""Asked to end by a signal, a run saves what it has done; going on, it is the run that was never asked."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM, SIGUSR1
from typing import Any

import pytest

from mmcore import checkpoint
from mmcore.config import ParallelConfig
from mmcore.evaluation.run_files import read_rows
from mmcore.training import loop
from mmcore.training.status import read_status
from tests import ranks
from tests.training import operated
from tests.training.operated import log


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: Any) -> Path:
    return operated.write_inputs(tmp_path_factory.mktemp("inputs"))


OPTIONS = ("--train.val-interval", 2, "--train.val-batches", 1)


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """A run that nobody interrupts."""
    run = inputs / "whole"
    assert ranks.run(operated.train, ParallelConfig(), 2, inputs, run, *OPTIONS) == [0, 0]
    assert (run / "DONE").read_text() == "8 steps\n"
    assert not read_status(run).findings and "state       finished" in read_status(run).lines
    return run


def before(name: str, owner: Any, call: int, action: Callable[[], object]) -> None:
    """Do something before a function is called for the given time."""
    function, calls = getattr(owner, name), [0]

    def called(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            action()
        return function(*args, **options)

    setattr(owner, name, called)


def interrupted(inputs: Path, run: Path, where: tuple[str, int], number: int, rank: int, *options: object) -> int:
    """A job that is sent a signal; on `rank` alone, unless it is -1."""
    name, call = where
    owner = checkpoint.Saving if name == "_write" else loop

    def send() -> None:
        if rank in (-1, int(os.environ["RANK"])):
            operated.signal_all(number)
        if name == "_write":
            time.sleep(1.0)  # a slow disk

    before(name, owner, call, send)
    return operated.train(inputs, run, *OPTIONS, *options)


MOMENTS: dict[str, tuple[tuple[str, int], int, int, int, tuple[object, ...]]] = {
    # where it comes, which, to which rank, the step that is saved, options
    "to one rank, with workers": (("train_step", 5), SIGUSR1, 1, 5, ("--data.num-workers", 2)),
    "while a checkpoint is written": (("_write", 1), SIGUSR1, 0, 5, ("--checkpoint.async-save",)),
    "while the run waits for one": (("_write", 1), SIGTERM, -1, 5, ()),
    "in the last step": (("train_step", 8), SIGTERM, -1, 8, ()),
    "before the first": (("Prefetch", 1), SIGUSR1, 1, 0, ()),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_asked_to_end(moment: str, inputs: Path, whole: Path, tmp_path: Path) -> None:
    where, number, rank, step, options = MOMENTS[moment]
    run = tmp_path / "run"
    codes = ranks.run(interrupted, ParallelConfig(), 2, inputs, run, where, number, rank, *options)
    assert codes == [75, 75] and not (run / "DONE").exists()
    saved = [int(folder.name[5:]) for folder in sorted(run.glob("step_*"))]
    assert saved == ([4, 5] if step == 5 else [4, 8] if step == 8 else [step] if step else [])
    assert not list(run.glob(".incomplete*"))
    assert ranks.run(operated.train, ParallelConfig(), 2, inputs, run, *OPTIONS, *options) == [0, 0]
    assert (run / "DONE").exists() and log(run) == log(whole)
    assert [end["code"] for end in read_rows(run / "ends.jsonl")] == [75, 0]
    assert (run / "validation.jsonl").read_text() == (whole / "validation.jsonl").read_text()
    last = [json.loads((at / "step_00000008" / "run.json").read_text()) for at in (run, whole)]
    assert last[0]["consumed_tokens"] == last[1]["consumed_tokens"]


def test_done_is_taken_back_when_there_is_more_to_do(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ranks.run(operated.train, ParallelConfig(), 1, inputs, run, "--train.steps", 4) == [0]
    assert (run / "DONE").exists()
    more = ("--train.steps", 6)
    assert ranks.run(interrupted, ParallelConfig(), 1, inputs, run, ("train_step", 1), SIGTERM, 0, *more) == [75]
    assert not (run / "DONE").exists()
    assert ranks.run(operated.train, ParallelConfig(), 1, inputs, run, *more) == [0]
    assert (run / "DONE").read_text() == "6 steps\n"


def as_a_new_process(*arguments: Any) -> Any:
    """What listens in this process, since a test before, does not in one that is started."""
    signal.signal(SIGTERM, signal.SIG_DFL)
    return interrupted(*arguments)


def test_without_checkpoints_a_signal_ends_as_ever(inputs: Path, tmp_path: Path) -> None:
    """There is nothing to save, so nothing is promised."""
    without = ("--checkpoint.save-interval", 0)
    with pytest.raises(AssertionError, match="or killed"):
        ranks.run(
            as_a_new_process, ParallelConfig(), 1, inputs, tmp_path / "run", ("train_step", 2), SIGTERM, 0, *without
        )
