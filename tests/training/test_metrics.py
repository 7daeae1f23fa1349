import atexit
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmcore.config import CheckpointConfig, DataConfig, LoggingConfig, RunConfig, TrainConfig
from mmcore.data.batch import EncodedSample, collate
from mmcore.data.stream import Count
from mmcore.models.flops import causal_pairs
from mmcore.training import metrics as module
from mmcore.training.loss import Share, token_loss
from mmcore.training.metrics import Metrics
from mmcore.training.step import StepResult
from mmcore.training.writers import check_writers


def sample(source: int, mask: list[float]) -> EncodedSample:
    tokens = torch.arange(len(mask))
    images = torch.empty(source, 3, 2, 2, dtype=torch.uint8)
    return EncodedSample(
        key="", source=source, tokens=tokens, labels=tokens, loss_mask=torch.tensor(mask), images=images
    )


def test_losses_are_kept_by_source() -> None:
    samples = [sample(2, [0, 1, 1]), sample(0, [1, 0]), sample(2, [0.5, 0, 0, 0])]
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    total, count, sums = token_loss(collate(samples, num_sources=3), losses)
    assert (float(total), int(count)) == (11.0, 4)
    assert sums.tolist() == [[4, 1, 1, 1, 2, 0, 2], [0] * 7, [1 + 2 + 0.5 * 8, 2.5, 3, 2, 7, 4, (9 + 16) / 2]]
    total.backward()
    assert losses.grad is not None and losses.grad.tolist() == [1, 1, 1, 0.5]
    assert Share.from_sums(*sums[2].tolist()) == Share(
        loss=7 / 2.5, num_tokens=3, num_samples=2, num_positions=7, num_images=4, num_pairs=12.5
    )
    assert Share.from_sums(*sums[1].tolist()).loss == 0
    windowed = token_loss(collate(samples, num_sources=3), losses, window=3)[2]
    assert windowed[:, 6].tolist() == [causal_pairs(2, 3), 0, causal_pairs(3, 3) + causal_pairs(4, 3)]


class Batches:
    def __init__(self, **counts: Count) -> None:
        self.waited, self._counts = 0.0, counts

    def counts(self) -> dict[str, Count]:
        return self._counts


def step(*shares: Share) -> StepResult:
    names = ("num_tokens", "num_samples", "num_positions")
    sums = {name: sum(getattr(share, name) for share in shares) for name in names}
    loss = sum(share.loss * share.num_tokens for share in shares) / sums["num_tokens"]
    return StepResult(total=Share(loss=loss, **sums), sources=list(shares), grad_norm=0.5)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        data=DataConfig(seq_length=100),
        train=TrainConfig(steps=9, global_batch_size=4),
        checkpoint=CheckpointConfig(save=str(tmp_path)),
        logging=LoggingConfig(log_interval=1, tensorboard_dir=str(tmp_path / "board")),
    )


def test_what_a_step_leaves(config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(config, 0)
    captions = Share(loss=2.0, num_tokens=30, num_samples=3, num_positions=120)
    chats = Share(loss=4.0, num_tokens=10, num_samples=2, num_positions=180)
    batches = Batches(captions=Count(samples=3, skipped=1), chats=Count(samples=2, cut=2))
    metrics.report(1, step(captions, chats), 1e-3, batches)
    batches.waited = 1e-9
    metrics.report(2, step(captions, replace(chats, num_tokens=0, num_samples=0, num_positions=0)), 1e-3, batches)
    metrics.close()

    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["loss"], first["num_tokens"], first["num_samples"], first["fill"]) == (2.5, 40, 5, 0.75)
    assert (first["skipped"], first["cut"]) == (1, 2) and 0 <= second["data_wait"] < 1
    assert 0.05 < first["memory_gib"] < 1000 and first["tokens_per_s"] > first["trained_tokens_per_s"] > 0
    assert first["sources"]["chats"] == {
        "loss": 4.0, "num_tokens": 10, "num_samples": 2, "num_positions": 180, "num_images": 0, "skipped": 0, "cut": 2
    }  # fmt: skip
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.value for event in board.Scalars("loss/captions")] == [2.0, 2.0]
    assert [event.step for event in board.Scalars("loss/chats")] == [1]  # it had no part in the second step
    said = capfd.readouterr().err
    assert "step      1/9 | loss 2.5000 | grad norm 0.500 | lr 1.00e-03" in said and "| skipped 1 | cut 2" in said


def test_the_line_of_a_step(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Short enough: sources that find no place are in the log, as all of them are."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    config = replace(config, train=TrainConfig(steps=20_000, global_batch_size=4))
    metrics = Metrics(replace(config, logging=LoggingConfig(log_interval=2)), 10_000)
    shares = [Share(loss=2.0 + index, num_tokens=30, num_samples=4, num_positions=99) for index in range(9)]
    named = Batches(**{f"source_{index}": Count() for index in range(9)})
    for number, most in ((10_001, (3 << 30, 1.0)), (10_002, (5 << 30, 4.5)), (10_003, (9 << 30, 9.0))):
        clock[0] += 10
        metrics.report(number, step(*shares), 1e-3, named, None, most)
    clock[0] += 10
    metrics.report(10_004, step(*shares[:2]), 1e-3, Batches(llava=Count(), coco=Count()), None, (0, 0))
    metrics.close()
    first, second, fourth = capfd.readouterr().err.splitlines()
    assert " | grad norm 0.500 | lr 1.00e-03 | 3.6 samples/s | 89 tokens/s | fill 223% | wait 10% | 3 GiB | " in first
    assert "| wait 45% | 5 GiB | left 1 day, 3:46:20 | source_0 2.00, source_1 3.00" in second
    assert len(first) < 180 and len(second) < 180 and "source_8" not in first
    assert fourth.endswith(" | llava 2.00, coco 3.00") and len(fourth) < 170


def test_one_source_is_not_told_twice(config: RunConfig, tmp_path: Path) -> None:
    metrics = Metrics(replace(config, logging=LoggingConfig()), 0)
    metrics.report(1, step(Share(loss=1.0, num_tokens=1, num_samples=1, num_positions=2)), 0.1, Batches(only=Count()))
    metrics.close()
    assert "sources" not in json.loads((tmp_path / "log.jsonl").read_text())


def test_tensorboard_keeps_what_the_checkpoint_has(config: RunConfig, tmp_path: Path) -> None:
    """A run that goes on from step 2 shows steps 1 and 2 of the first, and not the third, which was lost."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = step(Share(loss=1.0, num_tokens=1, num_samples=1, num_positions=2))
    for first_step, steps, lr in ((0, (1, 2, 3), 0.5), (2, (3, 4), 0.25)):
        metrics = Metrics(config, first_step)
        for number in steps:
            metrics.report(number, result, lr, Batches(only=Count()))
        metrics.close()
    rates = EventAccumulator(str(tmp_path / "board")).Reload().Scalars("lr")
    assert [(event.step, event.value) for event in rates] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)]


def test_a_torn_row_is_dropped(config: RunConfig, tmp_path: Path) -> None:
    log, row = tmp_path / "log.jsonl", '{"step": 1, "sources": {"a": {"loss": 1.0}}}'
    log.write_text(row + "\n" + row[:-1])
    Metrics(config, 4).close()
    assert log.read_text() == row + "\n"


def test_a_run_that_ends_in_a_fault_gives_the_cursor_back(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    metrics = Metrics(config, 0)
    assert metrics.bar.live.is_started and metrics.bar.stop in at_exit
    for action in at_exit:
        action()
    assert not metrics.bar.live.is_started
    metrics.close()


# What the trainer uses of W&B, written down call by call.
WANDB = """
import types
calls = []
class Error(Exception): pass
def init(**options):
    if options["project"] == "closed":
        raise Error("no key")
    calls.append(("init", options))
    def note(name):
        return lambda *values, **options: calls.append((name, *values, options))
    return types.SimpleNamespace(log=note("log"), define_metric=note("define_metric"), finish=note("finish"))
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb").calls
    sys.modules.pop("wandb", None)


def test_weights_and_biases(config: RunConfig, tmp_path: Path, wandb: list[tuple]) -> None:
    config = replace(config, logging=LoggingConfig(wandb_project="mine"))
    check_writers(config.logging)
    chats = Share(loss=4.0, num_tokens=0, num_samples=0, num_positions=0)
    captions = Share(loss=2.0, num_tokens=30, num_samples=3, num_positions=120)
    for first_step in (0, 1):
        metrics = Metrics(config, first_step)
        metrics.report(first_step + 1, step(captions, chats), 1e-3, Batches(captions=Count(), chats=Count(skipped=1)))
        metrics.report_validation(first_step + 1, captions, {"captions": captions})
        metrics.close()

    first, again = (options for name, *_, options in wandb if name == "init")
    assert (first["project"], first["name"], first["resume"]) == ("mine", tmp_path.name, "allow")
    assert first["id"] == again["id"] and len(first["id"]) == 8 and first["config"]["data"]["seq_length"] == 100
    assert ("define_metric", "*", {"step_metric": "step"}) in wandb and wandb[-1] == ("finish", {})
    logged = [values for name, values, *_ in wandb if name == "log"]
    assert [values["step"] for values in logged] == [1, 1, 2, 2]
    assert (logged[0]["loss"], logged[0]["loss/captions"], logged[0]["skipped/chats"]) == (2.0, 2.0, 1)
    assert "loss/chats" not in logged[0]  # it had no part in the step
    assert logged[1] == {"step": 1, "validation_loss": 2.0, "validation_loss/captions": 2.0}
    with pytest.raises(ValueError, match=r"--logging\.wandb-project closed: W&B does not begin the run: no key"):
        Metrics(replace(config, logging=LoggingConfig(wandb_project="closed")), 0)


def test_weights_and_biases_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_writers(LoggingConfig(wandb_project=""))
    with pytest.raises(ValueError, match=r"needs wandb, which is not installed: `pip install wandb`"):
        check_writers(LoggingConfig(wandb_project="mine"))
    with pytest.raises(ValueError, match=r"--logging\.wandb-name a needs --logging.wandb-project"):
        LoggingConfig(wandb_name="a")


def test_a_folder_for_tensorboard_that_cannot_be_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--logging.tensorboard-dir .*/file/a cannot be made: Not a directory"):
        check_writers(LoggingConfig(tensorboard_dir=str(tmp_path / "file" / "a")))
    check_writers(LoggingConfig(tensorboard_dir=str(tmp_path / "b" / "a")))
