"""Freezing as a schedule: what thaws, what it costs, and that a kill on either side of a switch changes nothing."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore import checkpoint
from mmcore.checkpoint_optimizer import optimizer_state
from mmcore.config import OptimizerConfig, ParallelConfig, RunConfig, StageConfig, TrainConfig
from mmcore.training.freezing import named_parameters
from mmcore.training.stages import Training, stage_of
from mmcore.training.step import train_step
from tests import ranks, tiny
from tests.training.test_layouts import LAYOUTS, microbatches

STAGES = (
    StageConfig(name="align", until=3, freeze=("vision_model", "language_model"), lr=4e-3),
    StageConfig(name="mid", until=6, freeze=("vision_model", r"language_model\.decoder\.layers\.\d+\.mlp")),
    StageConfig(name="full"),
)
STEPS, KILLED = 8, (2, 3, 4, 6)  # the last steps of the first two stages are 3 and 6
CONFIG = RunConfig(
    train=TrainConfig(steps=STEPS, stages=STAGES),
    optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1, lr_warmup_steps=1, module_lr=("vision_model=2e-4",)),
)


def started(layout: ParallelConfig, root: Path) -> Training:
    model = tiny.build(layout)
    (root / "tokenizer").mkdir(exist_ok=True)
    written = checkpoint.save_checkpoint(
        root / "start", 0, model=model, optimizer=None, state={}, loader_state=None, keep_last=1, **files(root)
    )
    training = Training(CONFIG, tiny.build(layout, seed=77))
    training.start(written)
    return training


def files(root: Path) -> dict[str, Any]:
    return {"architecture": tiny.architecture(), "tokenizer": root / "tokenizer"}


def run(training: Training, first: int, root: Path | None = None) -> list[Any]:
    """Train from a step to the end, with checkpoints around both switches where `root` is given."""
    results: list[Any] = []
    for step in range(first, STEPS + 1):
        said = training.advance(step)
        lr = training.scheduler.get_lr({})
        result = train_step(training.ddp, training.optimizer, training.scheduler, microbatches())
        results.append((step, lr, result.total.loss, result.grad_norm, said))
        if root and step in KILLED:
            kept = {"model": training.ddp, "optimizer": training.optimizer, "loader_state": None, "keep_last": STEPS}
            checkpoint.save_checkpoint(root / "run", step, state={"config": asdict(CONFIG)}, **kept, **files(root))
    return results


def other_rates(layout: ParallelConfig, root: Path) -> None:
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, module_lr=("vision_model=3e-4",)))
    Training(config, tiny.build(layout)).resume(root / "run" / "step_00000004")


def other_freeze(layout: ParallelConfig, root: Path) -> None:
    config = replace(CONFIG, train=TrainConfig(steps=STEPS))
    Training(config, tiny.build(layout)).resume(root / "run" / "step_00000004")


def killed(layout: ParallelConfig, root: Path, steps: tuple[int, ...] = KILLED) -> list[list[Any]]:
    found = []
    for step in steps:
        training = Training(CONFIG, tiny.build(layout, seed=9))
        assert training.resume(root / "run" / f"step_{step:08d}")["step"] == step
        found.append(run(training, step + 1))
    return found


@pytest.mark.parametrize("name", ["pp2", "dp2"])
def test_killed_around_a_switch(name: str, tmp_path: Path) -> None:
    layout, world_size = LAYOUTS[name]
    whole = ranks.run(lambda: run(started(layout, tmp_path), 1, tmp_path), layout, world_size)[0]
    said = {step: text for step, *_, text in whole if text}
    assert list(said) == [4, 7]
    assert said[4].startswith("stage mid from step 4: thaws language_model; freezes language_model")
    assert said[7] == f"stage full from step 7: thaws {', '.join(STAGES[1].freeze)}; freezes nothing; lr 2.00e-03"
    assert [lr for _, lr, *_ in whole] == pytest.approx([0, 4e-3, 2e-3, 0, 2e-3, 1e-3, 0, 2e-3])
    for results in ranks.run(killed, layout, world_size, layout, tmp_path):
        for step, result in zip(KILLED, results, strict=True):
            assert result == whole[step:]
    if name == "pp2":  # a switch on other ranks than those that the stage before was saved on
        other, world_size = LAYOUTS["tp2"]
        for (result,) in ranks.run(killed, other, world_size, other, tmp_path, (6,)):
            for row, expected in zip(result, whole[6:], strict=True):
                assert (row[0], row[-1]) == (expected[0], expected[-1])
                assert row[1:-1] == pytest.approx(expected[1:-1], rel=1e-4)
    if name == "dp2":
        with pytest.raises(
            AssertionError, match=r"was written with --optimizer.lr 0.002 and --optimizer.module-lr vis"
        ):
            ranks.run(other_rates, layout, world_size, layout, tmp_path)
        with pytest.raises(
            AssertionError, match=r"00000004 was written with vision_model .*mlp frozen, .* to be nothing"
        ):
            ranks.run(other_freeze, layout, world_size, layout, tmp_path)


def measured(layout: ParallelConfig, root: Path) -> list[dict[str, Any]]:
    """At each stage's last step: what is trained, the bytes it costs, and what a switch does to its state."""
    training, found = started(layout, root), []
    for step in range(1, STEPS + 1):
        train_step(training.ddp, training.optimizer, training.scheduler, microbatches())
        if step not in (3, 6, 8):
            continue
        names = {parameter: name for name, parameter in named_parameters(training.model)}
        weights = {name: parameter.detach().clone() for parameter, name in names.items()}
        before = optimizer_state(training.optimizer).states
        buffers = training.ddp.buffers
        (inner,) = training.optimizer.chained_optimizers
        found.append(
            {
                "trained": sum(parameter.numel() for parameter in names if parameter.requires_grad),
                "gradients": sum(buffer.grad_data.numel() for buffer in buffers),
                "held": {parameter.untyped_storage().nbytes() for parameter in names if not parameter.requires_grad},
                "sizes": {parameter.numel() * 4 for parameter in names if not parameter.requires_grad},
                "moments": sum(moment.numel() for state in inner.optimizer.state.values() for moment in state.values()),
                "main_grad": {name for parameter, name in names.items() if hasattr(parameter, "main_grad")},
                "state": {names[parameter] for parameter in before},
            }
        )
        if step < STEPS:
            training.advance(step + 1)
            known = optimizer_state(training.optimizer)
            assert known.updates == step
            assert all(torch.equal(weights[name], parameter) for parameter, name in names.items())
            for parameter, state in known.states.items():
                old = before.get(parameter)
                for kind, value in state.items():
                    expected = old[kind] if old else weights[names[parameter]].flatten() * (kind == "param")
                    assert torch.equal(value, expected), (names[parameter], kind)
    return found


def test_what_is_frozen_costs_nothing(tmp_path: Path) -> None:
    align, mid, full = ranks.run(measured, ParallelConfig(), 1, ParallelConfig(), tmp_path)[0]
    assert {name.split(".")[0] for name in align["state"]} == {"vision_projection"}
    assert align["state"] < mid["state"] < full["state"]
    assert not any(name.startswith(("vision_model", "language_model.decoder.layers.2.mlp")) for name in mid["state"])
    for stage in (align, mid, full):
        assert stage["main_grad"] == stage["state"]
        assert stage["moments"] == 2 * stage["trained"]
        assert stage["trained"] <= stage["gradients"] <= stage["trained"] + 128 * len(stage["state"])  # padding
        assert stage["held"] <= stage["sizes"]  # no view of a buffer that is larger


def test_stages_follow_each_other() -> None:
    planned = [StageConfig(until=3), StageConfig(until=5)]
    assert [stage_of(step, planned) for step in (0, 1, 3, 4, 5, 9)] == [0, 0, 0, 1, 1, 1]
    for ends in ((3, 3, 0), (0, 5), (9, 0), (2, 7)):
        with pytest.raises(ValueError, match=r"train.stages end at steps"):
            TrainConfig(steps=8, stages=tuple(StageConfig(until=end) for end in ends))
    with pytest.raises(ValueError, match="must be below the 2 of the shortest stage"):
        RunConfig(train=CONFIG.train, optimizer=OptimizerConfig(lr_warmup_steps=2)).check()
    with pytest.raises(ValueError, match=r"'all' of train.stages freezes every part"):
        StageConfig(name="all", freeze=("vision_model", "vision_projection", "language_model"))
