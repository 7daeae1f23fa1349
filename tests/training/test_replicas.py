"""A machine that computes wrongly without a word: its replica is found to differ, and nothing of it is saved."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.config import ParallelConfig
from mmcore.data.batch import Batch
from mmcore.training import loop, step
from mmcore.training.loss import token_loss
from mmcore.training.replicas import odd_ones
from tests import ranks
from tests.training import operated

THREE = ("--data.num-streams", 3, "--train.global-batch-size", 3)
WEIGHT = "vision_model.ln_pre.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: Any) -> Path:
    return operated.write_inputs(tmp_path_factory.mktemp("inputs"))


def flipped(inputs: Path, run: Path, rank: int, *options: object) -> int:
    """One bit of one weight changes in a rank's memory, after the second step: a frozen one, which stays so."""
    train_step, calls = loop.train_step, [0]

    def called(ddp: Any, *args: Any) -> Any:
        result = train_step(ddp, *args)
        calls[0] += 1
        if calls[0] == 2 and int(os.environ["RANK"]) == rank:
            ddp.module.get_parameter(WEIGHT).data.view(torch.int32)[7] ^= 1 << 12
        return result

    loop.train_step = called
    return operated.train(inputs, run, *options)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_weight_that_changes(world_size: int, inputs: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    options = THREE if world_size == 3 else ()
    assert ranks.run(flipped, ParallelConfig(), world_size, inputs, run, 1, *options) == [93] * world_size
    who = "rank 1 (" if world_size == 3 else "ranks 0 ("
    said = [line for line in capfd.readouterr().err.splitlines() if "differ" in line]
    assert len(said) == 1 and said[0].startswith(f"mmcore train: after step 4 {who}")
    assert f"in the weights, first of {WEIGHT}. A machine computes wrongly" in said[0]
    assert said[0].endswith("This was not saved, and there is no checkpoint of this run yet")
    assert not list(run.glob("*step_*")) and not (run / "DONE").exists()


def test_a_weight_that_changes_on_a_rank_that_shares_sequences(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    """Of context parallel ranks, each of which has all weights."""
    layout, options = ParallelConfig(context_parallel_size=2), ("--parallel.context-parallel-size", 2)
    run = tmp_path / "run"
    assert ranks.run(flipped, layout, 2, inputs, run, 1, *options) == [93, 93]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "differ" in line]
    assert line.startswith("mmcore train: after step 4 ranks 0 (") and f"in the weights, first of {WEIGHT}." in line


def computes_wrongly(inputs: Path, run: Path, rank: int, *options: object) -> int:
    """From the third step on, by one part in a thousand: no loss is conspicuous, and all get the same weights."""
    calls = [0]

    def called(batch: Batch, losses: torch.Tensor, **window: Any) -> Any:
        calls[0] += 1  # the third is that of the look before the second step's checkpoint
        wrong = calls[0] > 3 and int(os.environ["RANK"]) == rank
        return token_loss(batch, losses * 1.001 if wrong else losses, **window)

    step.token_loss = called
    return operated.train(inputs, run, *options)


def test_a_gradient_that_is_wrong(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    options = (*THREE, "--train.replica-check-interval", 3, "--checkpoint.save-interval", 2)
    assert ranks.run(computes_wrongly, ParallelConfig(), 3, inputs, run, 2, *options) == [93] * 3
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "differ" in line]
    assert (
        line.startswith("mmcore train: after step 3 rank 2 (") and "in the gradient that is computed of 000000" in line
    )
    assert line.endswith(f"the newest checkpoint is {run}/step_00000002")
    assert [folder.name for folder in run.glob("*step_*")] == ["step_00000002"]


LAYOUTS = {
    "overlapping": (ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True), 2),
    "pipeline": (ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_looking_changes_nothing(name: str, inputs: Path, tmp_path: Path) -> None:
    layout, world_size = LAYOUTS[name]
    changed = [
        option
        for field in ParallelConfig.__dataclass_fields__
        if (value := getattr(layout, field)) != getattr(ParallelConfig(), field)
        for option in (f"--parallel.{field.replace('_', '-')}", *(() if value is True else (value,)))
    ]
    for interval in (0, 1):
        options = (*changed, "--train.steps", 3, "--train.replica-check-interval", interval)
        assert (
            ranks.run(operated.train, layout, world_size, inputs, tmp_path / str(interval), *options)
            == [0] * world_size
        )
    assert operated.log(tmp_path / "0") == operated.log(tmp_path / "1")
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / run / "step_00000003").glob("*.distcp")} for run in "01"
    ]
    assert files[0] and files[0] == files[1]


def test_who_is_odd() -> None:
    same = torch.tensor([[5, 7], [5, 7], [5, 7]])
    assert odd_ones(same) == []
    assert odd_ones(torch.tensor([[5, 7], [5, 8], [5, 7]])) == [1]
    assert odd_ones(torch.tensor([[5, 7], [5, 8]])) == [0, 1]
    assert odd_ones(torch.tensor([[5, 7], [5, 8], [4, 7], [4, 7]])) == [0, 1, 2, 3]
    norms = torch.tensor([[1.0], [1.01], [0.99], [2.0]], dtype=torch.float64)
    assert odd_ones(norms, 0.05) == [3] and odd_ones(norms[:3], 0.05) == []
    nan = float("nan")
    assert odd_ones(torch.tensor([[1.0], [nan], [1.0]]), 0.05) == [1]
    assert odd_ones(torch.tensor([[nan], [nan]]), 0.05) == []
