"""A checkpoint is the same run at every layout, and bit for bit the same run at its own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

from mmcore import checkpoint, checkpoint_files, checkpoint_optimizer, distributed
from mmcore.config import OptimizerConfig, ParallelConfig
from mmcore.models.architecture import checkpoints
from mmcore.training import freezing
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import train_step
from tests import ranks, tiny
from tests.training.test_layouts import LAYOUTS, SEQUENCE_PARALLEL, microbatches

ALL = {"tp1": (ParallelConfig(), 1), **LAYOUTS, "tp2sp": (SEQUENCE_PARALLEL, 2)}
ONE_WAY = ("tp1", "tp2", "pp2", "dp2")
# Layouts that a checkpoint is written at and read at.
PAIRS = [
    *((written, read) for written in ONE_WAY for read in (*ONE_WAY, "tp2pp2") if read != written),
    *(("tp2pp2", read) for read in ONE_WAY),
    *(("tp2sp", "tp1"), ("pp2", "tp2sp")),
]
STEPS = 4


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the little there is is read in several."""
    monkeypatch.setattr(checkpoint_optimizer, "PORTION", 1 << 17)


def run(
    layout: ParallelConfig, folder: Path, *, resume: bool, steps: int, freeze: tuple[str, ...] = ("vision_model",)
) -> list[Any]:
    """Train, saving after STEPS steps; or go on from there."""
    model = tiny.build(layout, seed=9 if resume else 5)
    freezing.freeze(model, freeze)
    ddp = wrap(model)
    config = OptimizerConfig(lr=2e-3, weight_decay=0.1, lr_warmup_steps=2)
    optimizer = build_optimizer(config, ddp)
    scheduler = build_scheduler(config, optimizer, 2 * STEPS)
    done = 0
    if resume:
        state = checkpoint.load_checkpoint(checkpoints(folder)[-1], ddp, optimizer)
        done = state["step"]
        scheduler.step(increment=done)
    results = []
    for step in range(done + 1, done + steps + 1):
        batches = microbatches()
        result = train_step(ddp, optimizer, scheduler, batches)
        results += [result.total.loss, result.grad_norm]
        if step == STEPS and not resume:
            rank = parallel_state.get_data_parallel_rank() if distributed.is_data_source() else None
            checkpoint.save_checkpoint(
                folder,
                step,
                model=ddp,
                optimizer=optimizer,
                architecture=model.architecture,
                tokenizer=folder / "tokenizer",
                state={"note": "kept"},
                loader_state=None if rank is None else f"loader of {rank}".encode(),
                keep_last=2,
            )
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> dict[str, tuple[Path, list[Any]]]:
    """One run saved at each layout, with what it did before and after."""
    found = {}
    for name in ALL:
        folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer").mkdir()
        layout, world_size = ALL[name]
        results = ranks.run(
            lambda layout=layout, folder=folder: run(layout, folder, resume=False, steps=2 * STEPS), layout, world_size
        )
        found[name] = (folder, results[0])
    return found


@pytest.mark.parametrize("written", ALL)
def test_resumes_bit_for_bit(written: str, saved: Any) -> None:
    folder, uninterrupted = saved[written]
    layout, world_size = ALL[written]
    for result in ranks.run(lambda: run(layout, folder, resume=True, steps=STEPS), layout, world_size):
        assert result == uninterrupted[2 * STEPS :]
    newest = checkpoints(folder)[-1]
    assert sorted(path.name for path in newest.glob("loader_*")) == [
        f"loader_{rank:05d}.json" for rank in range(2 if written == "dp2" else 1)
    ]


@pytest.mark.parametrize(("written", "read"), PAIRS)
def test_resumes_at_another_layout(written: str, read: str, saved: Any) -> None:
    """Each of them at each other. Tolerance as in test_layouts: float32 sums in another order, over the steps that
    follow. The second loss and norm come after an update, so they are those of the optimizer's state too.
    """
    folder, uninterrupted = saved[written]
    layout, world_size = ALL[read]
    for result in ranks.run(lambda: run(layout, folder, resume=True, steps=2), layout, world_size):
        assert result == pytest.approx(uninterrupted[2 * STEPS : 2 * STEPS + 4], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in ALL if name != "tp1"])
def test_trains_alike_at_every_layout(name: str, saved: Any) -> None:
    """Losses and norms of eight updates."""
    assert saved[name][1] == pytest.approx(saved["tp1"][1], rel=1e-4)


def test_stage_without_trained_parameters(tmp_path: Path) -> None:
    """Alignment trains the projector alone, which lives on the first stage: the second keeps no state."""
    (tmp_path / "tokenizer").mkdir()
    layout, frozen = ParallelConfig(pipeline_model_parallel_size=2), ("vision_model", "language_model")
    first = ranks.run(lambda: run(layout, tmp_path, resume=False, steps=2 * STEPS, freeze=frozen), layout, 2)[0]
    for result in ranks.run(lambda: run(layout, tmp_path, resume=True, steps=STEPS, freeze=frozen), layout, 2):
        assert result == first[2 * STEPS :]


@pytest.mark.parametrize(("written", "read"), [("tp1", "tp1"), ("tp2", "tp2"), ("tp2", "tp1"), ("pp2", "dp2")])
def test_trained_tower_below_layers_that_never_run(written: str, read: str, tmp_path: Path) -> None:
    """The tower's last layer lies above the feature layer: it has weights, and no optimizer state."""
    (tmp_path / "tokenizer").mkdir()
    layout, world_size = ALL[written]
    first = ranks.run(lambda: run(layout, tmp_path, resume=False, steps=2 * STEPS, freeze=()), layout, world_size)[0]
    layout, world_size = ALL[read]
    for result in ranks.run(lambda: run(layout, tmp_path, resume=True, steps=2, freeze=()), layout, world_size):
        assert result == pytest.approx(first[2 * STEPS : 2 * STEPS + 4], rel=0 if written == read else 1e-4)


def test_damage_is_refused_and_named(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved["tp1"]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    newest = checkpoints(copy)[-1]
    assert checkpoint_files.verify(newest) == []
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (newest / "run.json").unlink()
    assert checkpoint_files.verify(newest) == [f"{file.name} has other content than was written", "run.json is missing"]
    with pytest.raises(AssertionError, match=rf"{file.name} has other content"):
        ranks.run(lambda: run(ParallelConfig(), copy, resume=True, steps=1), ParallelConfig(), 1)
