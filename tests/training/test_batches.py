"""How many rows a step has, which they are, and what their tokens count in its loss."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from mmcore.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mmcore.config_yaml import merge
from mmcore.data.batch import Batch
from mmcore.data.task_encoder import loss_weights
from mmcore.training import batches, metrics
from mmcore.training.loss import Share
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import StepResult, packed_seq_params, train_step
from tests import ranks, tiny
from tests.data import fabricated
from tests.training.test_policy import run

RAMPED = TrainConfig(global_batch_size=16, rampup_batch_size=(4, 4, 40))


def sizes(config: TrainConfig, steps: int) -> list[int]:
    return [config.batch_size(step) for step in range(1, steps + 1)]


def test_sizes_grow() -> None:
    """Three increments on the way: a larger step after each third of 40 rows, counted before the step."""
    assert sizes(RAMPED, 9) == [4, 4, 4, 4, 8, 8, 12, 16, 16]  # after 0, 4, 8, 12, 16, 24, 32, 44, 60 rows
    assert [RAMPED.rows_before(step) for step in (1, 2, 5, 8, 10)] == [0, 4, 16, 44, 76]
    assert sizes(TrainConfig(global_batch_size=16), 3) == [16, 16, 16]
    assert TrainConfig(global_batch_size=16).rows_before(1001) == 16_000
    quick = TrainConfig(global_batch_size=16, rampup_batch_size=(4, 4, 3))  # a step is more than a third of it
    assert sizes(quick, 3) == [4, 16, 16]


def test_sizes_go_by_what_was_done_before() -> None:
    """Megatron-LM's rule, told step by step."""
    chance = random.Random(0)
    for _ in range(200):
        start, increment, count, rows = (chance.randint(1, most) for most in (12, 9, 6, 200))
        whole, done = start + increment * count, 0
        config = TrainConfig(global_batch_size=whole, rampup_batch_size=(start, increment, rows))
        for step in range(1, 40):
            assert config.rows_before(step) == done
            assert config.batch_size(step) == min(whole, start + increment * (done * count // rows))
            done += config.batch_size(step)


def test_sizes_that_cannot_be_dealt_out() -> None:
    ramped = TrainConfig(global_batch_size=16, micro_batch_size=2, rampup_batch_size=(4, 4, 40))
    ramped.check_batch_sizes(2)
    assert [ramped.num_microbatches(2, rows) for rows in ramped.batch_sizes()] == [1, 2, 3, 4]
    message = (
        r"--train.rampup-batch-size 4 4 40: 4 rows on the way is not a multiple of --train.micro-batch-size 2 x 4 data"
    )
    with pytest.raises(ValueError, match=message):
        ramped.check_batch_sizes(4)
    odd = replace(ramped, rampup_batch_size=(8, 2, 40))
    with pytest.raises(ValueError, match="10 rows on the way"):
        odd.check_batch_sizes(2)
    with pytest.raises(ValueError, match=r"--train.global-batch-size 16 is not a multiple"):
        TrainConfig(global_batch_size=16).check_batch_sizes(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((4, 4), "4 4 is not START INCREMENT ROWS, three numbers above 0"),
        ((4, 0, 9), "4 0 9 is not START INCREMENT ROWS"),
        ((4, 5, 9), "does not grow from 4 by 5 to --train.global-batch-size 16"),
        ((16, 4, 9), "does not grow from 16 by 4"),
    ],
)
def test_ramps_that_are_none(given: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(global_batch_size=16, rampup_batch_size=given)


def test_ramps_from_yaml() -> None:
    found = merge(RunConfig(), {"train": {"rampup_batch_size": [64, 64, 10000]}}, "run.yaml")
    assert found.train.rampup_batch_size == (64, 64, 10000)
    for given in ([64, "64", 10000], [64, True, 10000], 64):
        with pytest.raises(ValueError, match=r"'train.rampup_batch_size' takes a list of numbers"):
            merge(RunConfig(), {"train": {"rampup_batch_size": given}}, "run.yaml")


def test_a_run_that_grows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A step has the rows of its number, also when the run comes by again; a "row" here is two samples."""
    options: dict[str, Any] = {"global_batch_size": 3, "rampup_batch_size": (1, 1, 6), "steps": 8}
    expected = sizes(TrainConfig(**options), 8)
    assert expected == [1, 1, 1, 2, 2, 3, 3, 3]
    rows = run(tmp_path, "whole", bad={}, **options)
    assert [row["num_samples"] for row in rows] == [2 * size for size in expected]
    assert "memory of a rank before activations: 0.00229 GB (weights 0.000573, " in capfd.readouterr().err
    first, second = rows[0], rows[6]
    for row in (first, second):
        assert row["fill"] == pytest.approx(row["num_positions"] / (row["num_samples"] // 2 * 1024), abs=1e-4)
    rewound = run(tmp_path, "rewound", bad={8: math.nan}, on_bad_step="rewind", **options)  # at step 6, back to 4
    assert [row["num_samples"] for row in rewound] == [2 * size for size in expected]
    assert rewound[4]["fault"].startswith("went back to step 4")


def test_what_is_left_goes_by_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A second a row: after four of nine steps 16 of 76 rows are done."""
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    config = RunConfig(
        data=DataConfig(seq_length=10),
        train=replace(RAMPED, steps=9),
        checkpoint=CheckpointConfig(save=str(tmp_path)),
        logging=LoggingConfig(log_interval=1),
    )
    told = metrics.Metrics(config, 0)
    source = SimpleNamespace(waited=0.0, counts=dict)
    for step in range(1, 6):
        rows = config.train.batch_size(step)
        clock[0] += rows
        total = Share(loss=1.0, num_tokens=rows, num_samples=rows, num_positions=9 * rows)
        told.report(step, StepResult(total=total, sources=[], grad_norm=1.0), 0.1, source)
    told.close()
    fourth, fifth = capfd.readouterr().err.splitlines()[3:5]
    assert "step      4/9" in fourth and "left 0:01:00" in fourth and "left 0:00:52" in fifth
    assert {json.loads(line)["fill"] for line in (tmp_path / "log.jsonl").read_text().splitlines()} == {0.9}


def read(config: TrainConfig, path: Path, kills: int, chance: random.Random) -> list[list[list[str]]]:
    """The keys of every micro batch of every step, from a run on other numbers of ranks after every kill."""
    tokenizer = fabricated.tokenizer(path.parent / f"tokenizer-{kills}")
    ledger: list[list[list[str]]] = []
    states: list[bytes] = []
    for _ in range(kills + 1):
        size = chance.choice([1, 2, 4]) if kills else 1
        data = {"packing_buffer_size": 12, "num_streams": 4}
        loaders = [
            fabricated.loader(
                path,
                tokenizer,
                data=data,
                micro_batch_size=1,
                data_parallel_rank=rank,
                data_parallel_size=size,
                states=states,
            )
            for rank in range(size)
        ]
        readers = [iter(loader) for loader in loaders]
        trained = []
        for step in range(len(ledger) + 1, len(ledger) + (3 if kills else 30)):
            count = config.num_microbatches(size, config.batch_size(step))
            rounds = [[next(reader).keys for reader in readers] for _ in range(count)]
            trained.append([keys for batches in rounds for keys in batches])
            if not kills or chance.random() < 0.7:  # a checkpoint
                ledger += trained
                trained, states = [], [loader.state_dict() for loader in loaders]
                if kills:
                    break
    return ledger


def test_a_ledger_of_kills_on_the_way(tmp_path: Path) -> None:
    """Killed and started again on other numbers of ranks, a run that grows trains on what it would have without."""
    path = fabricated.write_shards(tmp_path / "data", 60)
    killed = read(RAMPED, path, 20, random.Random(0))
    assert 10 < len(killed) < 29 and len(killed[0]) == 4 and len(killed[9]) == 16
    assert killed == read(RAMPED, path, 0, random.Random(0))[: len(killed)]


def test_a_ledger_of_any_number_of_batches(tmp_path: Path) -> None:
    """Three batches are none too many for four ranks; what they save next is as good as any state."""
    path = fabricated.write_shards(tmp_path / "data", 60)
    tokenizer = fabricated.tokenizer(tmp_path / "tokenizer")
    found: list[list[str]] = []
    states: list[bytes] = []
    for size, rounds in ((1, 3), (4, 2), (2, 3), (1, 2)):
        loaders = [
            fabricated.loader(
                path,
                tokenizer,
                data={"num_streams": 4},
                data_parallel_rank=rank,
                data_parallel_size=size,
                states=states,
            )
            for rank in range(size)
        ]
        readers = [iter(loader) for loader in loaders]
        turns = [[next(reader).keys for reader in readers] for _ in range(rounds)]
        # Which rank has the first of them depends on how many there were before.
        shift = len(found) % size
        found += [keys for turn in turns for keys in turn[shift:] + turn[:shift]]
        states = [loader.state_dict() for loader in loaders]
    whole = iter(fabricated.loader(path, tokenizer, data={"num_streams": 4}))
    assert found == [next(whole).keys for _ in range(3 + 8 + 6 + 2)]


def test_the_loader_is_told_the_weighting(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(batches, "build_loader", lambda *_, **given: told.append(given["loss_weighting"]) or [])
    monkeypatch.setattr(batches, "load_tokenizer", lambda *_: None)
    for name, value in (("is_data_source", True), ("data_parallel_rank", 0), ("data_parallel_size", 1)):
        monkeypatch.setattr(batches.distributed, name, lambda value=value: value)
    config = RunConfig(train=TrainConfig(loss_weighting="sqrt_turn"))
    for split in ("train", "val"):
        batches.Batches(config, tiny.architecture(), Path(), split=split)
    assert told == ["sqrt_turn", "sqrt_turn"]


def test_samples_that_are_made_up_have_no_answers_to_weigh() -> None:
    config = RunConfig(data=DataConfig(synthetic=True), train=TrainConfig(loss_weighting="sqrt_turn"))
    with pytest.raises(
        ValueError, match=r"--train.loss-weighting sqrt_turn weighs answers, and --data.synthetic makes"
    ):
        config.check()


def weighted(first: int, size: int, images: int) -> Batch:
    """Samples that each have two answers, of which the second begins in the middle of what was one."""
    batch = tiny.batch(first, size, images)
    mask = batch.loss_mask[0] > 0
    for position in batch.loss_positions[2::5]:
        mask[position] = False
    weights = torch.from_numpy(loss_weights(mask.numpy(), "sqrt_turn"))
    return replace(batch, loss_mask=weights[None], loss_positions=weights.nonzero().squeeze(-1))


MICROBATCHES = [(0, 2, 1), (2, 1, 1), (4, 3, 2), (7, 2, 0)]


def trained(parallel: ParallelConfig) -> list[tuple[float, float, int]]:
    """Loss, norm of the gradient and trained tokens of three steps."""
    ddp = wrap(tiny.build(parallel), parallel)
    config = OptimizerConfig(lr=2e-3, clip_grad=0)
    optimizer = build_optimizer(config, ddp)
    scheduler = build_scheduler(config, optimizer, 10)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = [weighted(*spec) for spec in MICROBATCHES[rank::size]]
    results = [train_step(ddp, optimizer, scheduler, batches) for _ in range(3)]
    return [(result.total.loss, result.grad_norm, result.total.num_tokens) for result in results]


def plainly() -> tuple[float, float, int]:
    """The formula itself, of one step: sum(w l) / sum(w), differentiated."""
    model = tiny.build(ParallelConfig())
    total, weights, count = torch.zeros(()), 0.0, 0
    for spec in MICROBATCHES:
        batch = weighted(*spec)
        losses = model(
            batch.tokens,
            batch.images,
            labels=batch.labels,
            positions=batch.loss_positions,
            packed_seq_params=packed_seq_params(batch),
        ).flatten()
        weight = batch.loss_mask[0, batch.loss_positions]
        total = total + (weight * losses).sum()
        weights += float(weight.double().sum())
        count += len(weight)
    loss = total / weights
    loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return float(loss.detach()), float(torch.stack(norms).norm()), count


def test_weighted_losses_on_every_layout() -> None:
    (expected,) = ranks.run(plainly, ParallelConfig(), 1)
    assert len({float(weight) for spec in MICROBATCHES for weight in weighted(*spec).loss_mask.unique()}) > 3
    (alone,) = ranks.run(trained, ParallelConfig(), 1, ParallelConfig())
    assert alone[0] == pytest.approx(expected, rel=1e-5)
    for layout in (ParallelConfig(), ParallelConfig(pipeline_model_parallel_size=2)):
        for result in ranks.run(trained, layout, 2, layout, timeout=30):
            for step, row in enumerate(result):
                assert row == pytest.approx(alone[step], rel=1e-5)
