"""A bad step that ends a job is computed again by the next one: what is bad again is no fault of a machine."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.config import ParallelConfig
from mmcore.data.batch import Batch
from mmcore.training import step
from mmcore.training.loss import token_loss
from tests import ranks
from tests.training import operated


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: Any) -> Path:
    return operated.write_inputs(tmp_path_factory.mktemp("inputs"))


def job(inputs: Path, run: Path, bad: int, *options: object) -> tuple[int, list[str]]:
    """On two replicas, of which the second computes its second micro batch of a step wrongly; 0 for none.

    Returns:
        Exit code, and the samples of that micro batch.
    """
    keys: list[str] = []
    calls = 0

    def spoiled(batch: Batch, losses: torch.Tensor, **window: Any) -> Any:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == "1" and calls == 2 * bad:
            keys.extend(batch.keys)
            losses = losses * float("nan")
        return token_loss(batch, losses, **window)

    step.token_loss = spoiled
    no_other = ("--train.replica-check-interval", 0)  # which would compute micro batches too
    return operated.train(inputs, run, *no_other, *options), keys


def jobs(inputs: Path, run: Path, bad: int, *options: object) -> tuple[list[int], list[str], list[Any]]:
    codes, keys = zip(*ranks.run(job, ParallelConfig(), 2, inputs, run, bad, *options), strict=True)
    suspect = run / "suspect.json"
    return list(codes), keys[1], json.loads(suspect.read_text())["places"] if suspect.exists() else []


def test_bad_again_and_good_again(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    """What is good after all is said, was a machine, and is forgotten with the next checkpoint."""
    run = tmp_path / "run"
    codes, samples, (place,) = jobs(inputs, run, 6)
    assert codes == [16, 16] and len(samples) == 1
    assert (place["step"], place["samples"], place["hosts"]) == (6, samples, [socket.gethostname()])
    said = capfd.readouterr().err
    kept = f"Nothing of it was kept, and the last checkpoint is {run}/step_00000004"
    assert f"mmcore train: step 6 is bad: the loss is nan. {kept}. Its samples: {samples[0]} (all are in {run}" in said
    assert "/suspect.json). Start the same command again: what is bad again is no fault of a machine" in said
    assert jobs(inputs, run, 2)[:2] == ([17, 17], samples)  # the second step from step_00000004
    assert "It was bad in an earlier job too, so it is the data or the model" in capfd.readouterr().err
    assert sorted(folder.name for folder in run.glob("step_*")) == ["step_00000004"] and not (run / "DONE").exists()
    codes, _, places = jobs(inputs, run, 0)
    assert codes == [0, 0] and not places and (run / "DONE").exists()
    machine = f"that was a machine, of {socket.gethostname()}"
    assert f"step 6 was bad in an earlier job and is good: {machine}" in capfd.readouterr().err


def test_one_place_after_the_other(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    assert jobs(inputs, run, 2)[0] == [16, 16]
    assert jobs(inputs, run, 3)[0] == [16, 16]
    codes, _, places = jobs(inputs, run, 1)
    assert codes == [93, 93] and [place["step"] for place in places] == [2, 3, 1]
    assert places[0]["was_good_again"] and "Steps 2, 3, 1 were bad in one job after the other" in capfd.readouterr().err


def test_more_bad_steps_than_the_run_may_have(inputs: Path, tmp_path: Path) -> None:
    """They were gone past, or back from, on purpose: another try would do no better."""
    skip = (
        "--train.on-bad-step",
        "skip",
        "--train.max-bad-steps",
        1,
        "--optimizer.lr",
        "1e30",
        "--optimizer.clip-grad",
        0,
    )
    assert ranks.run(operated.train, ParallelConfig(), 1, inputs, tmp_path / "run", *skip) == [17]
