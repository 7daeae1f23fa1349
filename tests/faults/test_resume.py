"""A run goes on exactly: at its own layout bit for bit, at another one with the same samples, weights and moments."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore import checkpoint_files as files
from tests.faults.chain import sums
from tests.faults.jobs import Job, arguments
from tests.faults.recorder import ledger, record, rows, whole_state
from tests.faults.size import SIZE

SAVED = 5
# Losses after a change of layout, as in tests/training/test_layouts.py: float32 sums in another order.
ROUNDING = 1e-4


def options(layout: str) -> tuple[list[object], int]:
    """Of a layout such as tp2pp1dp2, and its ranks."""
    tensor, pipeline, data = (int(layout[place]) for place in (2, 5, 8))
    given = ["--parallel.tensor-model-parallel-size", tensor, "--parallel.pipeline-model-parallel-size", pipeline]
    return given, tensor * pipeline * data


def trained(inputs: Path, run: Path, layout: str, steps: int, *more: object) -> Path:
    """The folder of notes of a run; it keeps a checkpoint after `SAVED` steps, from which another one may go on."""
    given, ranks = options(layout)
    given += ["--checkpoint.save-interval", SAVED, "--checkpoint.keep-last", 100, "--train.global-batch-size", 4, *more]
    notes = run.with_name(f"{run.name}-notes")
    job = Job(arguments(inputs, run, steps, *given), ranks, notes, record(notes, SAVED))
    assert job.wait(1200) == dict.fromkeys(range(ranks), 0), "\n".join(map(job.said, range(ranks)))
    return notes


def resumed(inputs: Path, run: Path, other: Path, layout: str, steps: int, *more: object) -> Path:
    """The same of a run that goes on from the checkpoint of another."""
    other.mkdir()
    shutil.copytree(files.step_folder(run, SAVED), files.step_folder(other, SAVED))
    shutil.copy(run / "log.jsonl", other)
    return trained(inputs, other, layout, steps, *more)


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of runs that nobody interrupted, by layout, steps and options; each is made once."""
    made: dict[tuple[Any, ...], tuple[Path, Path]] = {}

    def run(layout: str, steps: int, *more: object) -> tuple[Path, Path]:
        key = (layout, steps, *more)
        if key not in made:
            folder = tmp_path_factory.mktemp("run") / "run"
            made[key] = folder, trained(inputs, folder, layout, steps, *more)
        return made[key]

    return run


@pytest.mark.parametrize("workers", SIZE.workers, ids=lambda workers: "{} then {}".format(*workers))
@pytest.mark.parametrize("layout", SIZE.exact_layouts)
def test_resume_is_exact(
    layout: str, workers: tuple[int, int], inputs: Path, runs: Any, tmp_path: Path, tell: Any
) -> None:
    """Loss, weights, moments, schedule, random generators and samples of each step on each rank, and the last files."""
    steps = SAVED + SIZE.steps
    run, notes = runs(layout, steps, "--data.num-workers", workers[0])
    again = resumed(inputs, run, tmp_path / "again", layout, steps, "--data.num-workers", workers[1])
    _, ranks = options(layout)
    for rank in range(ranks):
        whole = rows(notes, rank)
        assert [row.step for row in whole] == list(range(1, steps + 1))
        assert len({row.weights for row in whole}) > SIZE.steps  # all are other weights
        assert rows(again, rank) == whole[SAVED:]
    assert sums(files.step_folder(tmp_path / "again", steps)) == sums(files.step_folder(run, steps))
    tell("resume is exact", f"{layout}, loader workers {workers[0]} then {workers[1]}: {SIZE.steps} steps bit-equal")


@pytest.mark.parametrize(("written", "read"), SIZE.layouts)
def test_layout_may_change(written: str, read: str, inputs: Path, runs: Any, tmp_path: Path, tell: Any) -> None:
    run, notes = runs(written, SAVED + 3)
    again = resumed(inputs, run, tmp_path / "again", read, SAVED + 3)
    before, after = whole_state(notes, options(written)[1]), whole_state(again, options(read)[1])
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert {kind for _, kind in before} == {"weight", "param", "exp_avg", "exp_avg_sq"}
    kept = {step: keys for step, keys in ledger(notes, options(written)[1]).items() if step > SAVED}
    assert ledger(again, options(read)[1]) == kept
    worst = 0.0
    for row, other in zip(rows(notes, 0)[SAVED:], rows(again, 0), strict=True):
        assert (other.loss, other.grad_norm) == pytest.approx((row.loss, row.grad_norm), rel=ROUNDING)
        assert other.rates == row.rates
        worst = max(worst, abs(other.loss / row.loss - 1))
    tell("layout may change", f"{written} to {read}: {len(before)} tensors bit-equal, losses within {worst:.1e}")
