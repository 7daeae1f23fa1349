"""Bad steps, in the trainer's own loop over batches that are made bad."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mmcore import checkpoint
from mmcore.checkpoint_optimizer import optimizer_state
from mmcore.commands import train as command
from mmcore.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from mmcore.data.batch import Batch
from mmcore.training import batches, loop, step
from mmcore.training.loss import token_loss
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.policy import FEWEST, BadStepError, BadSteps
from mmcore.training.step import train_step
from tests import ranks, tiny

STEPS = 8


class Batches(Iterator[Batch]):
    """Batches by number; losses of `bad` ones are multiplied by what it says, those of `left_out` are not there.

    Before one that is named in `damage`, a file is damaged.
    """

    sources: tuple[str, ...] = ()
    bad: ClassVar[dict[int, float]] = {}
    left_out: ClassVar[tuple[int, ...]] = ()
    damage: ClassVar[dict[int, Path]] = {}

    def __init__(self, *_: Any, resumed: bool = False) -> None:
        assert not resumed
        self.next, self.waited = 0, 0.0

    def __next__(self) -> Batch:
        while self.next in self.left_out:
            self.next += 1
        number, self.next = self.next, self.next + 1
        if number in self.damage:
            self.damage[number].write_bytes(b"")
        return replace(tiny.batch(2 * number % 16, 2), keys=[str(self.bad.get(number, 1.0))])

    def counts(self) -> dict[str, Any]:
        return {}

    def state(self) -> bytes:
        return b""


def spoiled_loss(batch: Batch, losses: torch.Tensor, **window: Any) -> Any:
    return token_loss(batch, losses * float(batch.keys[0]), **window)


def run(root: Path, name: str, *, bad: dict[int, float], left_out: tuple[int, ...] = (), **options: Any) -> list[Any]:
    """Train from the same weights every time; returns log.jsonl, or what stopped it."""

    def trained() -> str:
        start, folder = root / name / "start", root / name / "run"
        (root / name / "tokenizer").mkdir(parents=True)
        content = {"architecture": tiny.architecture(), "tokenizer": root / name / "tokenizer", "loader_state": None}
        model = tiny.build(ParallelConfig())
        checkpoint.save_checkpoint(start, 0, model=model, optimizer=None, state={}, keep_last=1, **content)
        Batches.bad, Batches.left_out = bad, left_out
        loop.Batches = Batches  # type: ignore
        step.token_loss = spoiled_loss
        loop.distributed.initialize = lambda *_: None  # the test's groups are up
        config = RunConfig(
            model=ModelConfig(checkpoint=str(start)),
            train=TrainConfig(**{"steps": STEPS, "global_batch_size": 1, "precision": "fp32", **options}),
            optimizer=OptimizerConfig(lr=2e-3, lr_warmup_steps=2),
            checkpoint=CheckpointConfig(save=str(folder), save_interval=4),
        )
        try:
            loop.train(config, tiny.architecture())
        except BadStepError as error:
            return str(error)
        return (folder / "log.jsonl").read_text()

    (text,) = ranks.run(trained, ParallelConfig(), 1)
    return [json.loads(line) for line in text.splitlines()] if text.startswith("{") else [text]


def numbers(rows: list[Any]) -> list[Any]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["num_samples"]) for row in rows]


NAN = float("nan")


def test_rewind(tmp_path: Path) -> None:
    """The same as a run that never had the batches between checkpoint and fault, and one row a step."""
    rows = run(tmp_path, "bad", bad={5: NAN, 8: NAN}, on_bad_step="rewind")
    assert numbers(rows) == numbers(run(tmp_path, "never", bad={}, left_out=(4, 5, 6, 7, 8)))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    faults = {row["step"]: row["fault"] for row in rows if "fault" in row}
    assert faults == {5: "went back to step 4: the loss is nan"}


def test_rewind_past_a_damaged_checkpoint(tmp_path: Path) -> None:
    damaged = tmp_path / "bad" / "run" / "step_00000008"
    Batches.damage = {9: damaged / "common.pt"}
    try:
        rows = run(tmp_path, "bad", bad={9: NAN}, on_bad_step="rewind", steps=12)
    finally:
        Batches.damage = {}
    never = run(tmp_path, "never", bad={}, left_out=(4, 5, 6, 7, 8, 9), steps=12)
    assert numbers(rows) == numbers(never)
    assert (damaged.parent / "damaged-step_00000008").is_dir() and damaged.is_dir()


def test_skip(tmp_path: Path) -> None:
    rows = run(tmp_path, "bad", bad={5: NAN}, on_bad_step="skip")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row.get("fault", "") for row in rows] == [""] * 5 + ["the loss is nan"] + [""] * 2
    never = run(tmp_path, "never", bad={}, left_out=(5,))
    assert numbers(rows[:5]) == numbers(never[:5])
    assert rows[6]["loss"] == never[5]["loss"]  # the weights of step 7 are those that step 5 left


def test_spikes(tmp_path: Path) -> None:
    """A gradient 50 times as large as the others; the loss is found to be what it is, the weights are left alone."""
    steps, bad = FEWEST + 3, {FEWEST + 1: 50.0}
    rows = run(tmp_path, "spike", bad=bad, on_bad_step="skip", spike_factor=5.0, steps=steps)
    (fault,) = [(row["step"], row["fault"]) for row in rows if "fault" in row]
    assert fault[0] == FEWEST + 2 and fault[1].endswith("times its running median")
    assert all(row["loss"] < 50 for row in rows if "fault" not in row)
    policy = BadSteps(TrainConfig(on_bad_step="skip"))
    assert not any(policy.fault(1.0, norm) for norm in [1.0] * FEWEST + [1e6])  # off by default


def test_it_stops(tmp_path: Path) -> None:
    (told,) = run(tmp_path, "stop", bad={5: float("inf")})
    assert told.startswith("step 6 is bad: the loss is inf. Nothing of it was kept, and the last checkpoint is")
    assert "run/step_00000004. Its samples: inf (all are in" in told
    (told,) = run(tmp_path, "early", bad={1: NAN}, on_bad_step="rewind")
    assert told.startswith("step 2 is bad: the loss is nan; the run cannot go back, and there is no checkpoint")


@pytest.mark.parametrize(
    ("action", "says"), [("skip", "so were the 2 before"), ("rewind", "went back 2 times already")]
)
def test_it_does_not_go_on_for_ever(action: str, says: str, tmp_path: Path) -> None:
    (told,) = run(tmp_path, action, bad=dict.fromkeys(range(4, 99), NAN), on_bad_step=action, max_bad_steps=2, steps=50)
    assert says in told and "the last checkpoint is" in told and "step_00000004" in told


def test_good_steps_end_a_row() -> None:
    policy = BadSteps(TrainConfig(on_bad_step="skip", max_bad_steps=1))
    for _ in range(3):
        assert policy.fault(NAN, 1.0) == "the loss is nan" and policy.answer(1, "x", None) == "skip"
        assert policy.fault(1.0, 1.0) == ""
    assert policy.fault(1.0, float("inf")) == "the gradient's norm is inf"


def test_nothing_of_a_bad_step_is_kept() -> None:
    def stepped() -> bool:
        ddp = wrap(tiny.build(ParallelConfig()))
        config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
        optimizer = build_optimizer(config, ddp)
        scheduler = build_scheduler(config, optimizer, 10)
        train_step(ddp, optimizer, scheduler, [tiny.batch(0, 2)])
        before = optimizer_state(optimizer)
        weights = [parameter.detach().clone() for parameter in ddp.parameters()]
        result = train_step(ddp, optimizer, scheduler, [tiny.batch(2, 2)], lambda *_: "bad")
        assert result.fault == "bad" and scheduler.num_steps == 2
        after = optimizer_state(optimizer)
        assert before.updates == after.updates == 1
        for parameter, state in before.states.items():
            assert all(torch.equal(state[kind], after.states[parameter][kind]) for kind in state)
        return all(torch.equal(old, new) for old, new in zip(weights, ddp.parameters(), strict=True))

    assert ranks.run(stepped, ParallelConfig(), 1) == [True]


def test_the_command_says_it_in_one_paragraph(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def bad(*_: Any) -> None:
        raise BadStepError("step 6 is bad: it was made so")

    monkeypatch.setattr(loop, "train", bad)
    monkeypatch.setattr(command, "check", lambda *_: None)
    monkeypatch.setattr(batches, "check_data", lambda *_: None)
    assert command.main(["quickstart_sft", "--checkpoint.save", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "mmcore train: step 6 is bad: it was made so\n"
