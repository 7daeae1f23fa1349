"""What each rank of a run sees, step by step, noted by the rank itself."""

import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mmcore.checkpoint_optimizer import optimizer_state
from mmcore.training import loop
from tests import tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A step."""

    step: int
    replica: int
    keys: list[list[str]]
    """Of the samples of each micro batch of this replica."""
    loss: float
    grad_norm: float
    rates: list[float]
    """Of each of the optimizer's groups."""
    weights: int
    """CRC-32 of this rank's, as of what follows."""
    moments: int
    random: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A rank's part of a parameter, and of what the optimizer knows of it where this rank has that."""

    name: str
    """In the whole model."""
    cut: int
    """Dimension that tensor ranks share; -1 for none."""
    stride: int
    """Pieces that are cut one by one, such as gate and up."""
    tensor_rank: int
    values: dict[str, torch.Tensor]
    """The weight, and float32 master and moments, in the parameter's shape."""


def record(notes: Path, state_after: int = -1) -> Callable[[int], None]:
    """What `Job` is to do first in each rank: note all steps, and the parameters after one of them."""

    def before(rank: int) -> None:
        notes.mkdir(exist_ok=True)
        train_step = loop.train_step
        steps = (notes / f"steps-{rank}").open("wb", buffering=0)

        def noted(model: Any, optimizer: Any, scheduler: Any, batches: Any, *args: Any) -> Any:
            if scheduler.num_steps == state_after:
                (notes / f"state-{rank}").write_bytes(pickle.dumps(list(parts(model, optimizer))))
            result = train_step(model, optimizer, scheduler, batches, *args)
            row = Row(
                step=scheduler.num_steps,
                replica=parallel_state.get_data_parallel_rank(),
                keys=[list(batch.keys) for batch in batches],
                loss=result.total.loss,
                grad_norm=result.grad_norm,
                rates=[group["lr"] for group in optimizer.param_groups],
                weights=crc(model.parameters()),
                moments=crc(moments(optimizer)),
                random=crc([torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]),
            )
            steps.write(pickle.dumps(row))
            return result

        loop.train_step = noted

    return before


def rows(notes: Path, rank: int) -> list[Row]:
    found = []
    with (notes / f"steps-{rank}").open("rb") as file:
        while file.peek(1):
            found.append(pickle.load(file))
    return found


def ledger(notes: Path, ranks: int) -> dict[int, list[str]]:
    """Keys of all samples of each step, in the order of the run's micro batches, which replicas take in turn."""
    every: dict[int, dict[int, Row]] = {}
    for rank in range(ranks):
        for row in rows(notes, rank):
            same = every.setdefault(row.step, {}).setdefault(row.replica, row)
            assert same.keys == row.keys  # all ranks of a replica compute the same samples
    found = {}
    for step, replicas in every.items():
        turns = zip(*(replicas[replica].keys for replica in sorted(replicas)), strict=True)
        found[step] = [key for turn in turns for batch in turn for key in batch]
    return found


def whole_state(notes: Path, ranks: int) -> dict[tuple[str, str], torch.Tensor]:
    """Parameters and what the optimizer knows of them, put together from all ranks: by name and kind."""
    shards: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    cuts = {}
    for rank in range(ranks):
        for part in pickle.loads((notes / f"state-{rank}").read_bytes()):
            cuts[part.name] = (part.cut, part.stride)
            for kind, value in part.values.items():
                same = shards.setdefault((part.name, kind), {}).setdefault(part.tensor_rank, value)
                assert torch.equal(same, value), part.name  # as all replicas have it
    whole = {}
    for (name, kind), of_rank in shards.items():
        cut, stride = cuts[name]
        values = [of_rank[rank] for rank in sorted(of_rank)]
        if cut < 0:
            assert all(torch.equal(values[0], other) for other in values[1:]), name
            whole[name, kind] = values[0]
        else:
            turns = zip(*(value.chunk(stride, cut) for value in values), strict=True)
            whole[name, kind] = torch.cat([torch.cat(turn, cut) for turn in turns], cut)
    return whole


def parts(model: Any, optimizer: Any) -> Iterator[Part]:
    """All ranks call it."""
    states = optimizer_state(optimizer).states
    for name, parameter in tiny.global_parameters(model.module):
        if getattr(parameter, "shared", False):
            continue
        values = {"weight": parameter.detach().clone()}
        values |= {kind: value.view(parameter.shape) for kind, value in states.get(parameter, {}).items()}
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        yield Part(
            name=name,
            cut=parameter.partition_dim if is_cut else -1,
            stride=parameter.partition_stride if is_cut else 1,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            values=values,
        )


def moments(optimizer: Any) -> Iterator[torch.Tensor]:
    """This replica's share of masters and moments, and how often they were updated."""
    for one in optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            yield torch.tensor(group.get("step", 0))
            for parameter in group["params"]:
                yield parameter
                state = one.optimizer.state[parameter]
                yield from (state[kind] for kind in sorted(state))


def crc(tensors: Iterable[torch.Tensor]) -> int:
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), found)
    return found
