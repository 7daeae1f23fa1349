"""Ranks: process group, megatron-core's parallel groups, seeds, who writes, who reads data."""

import itertools
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmcore import host
from mmcore.config import ParallelConfig

host.use_host()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (host first: it mends what this imports)

# Longest pause between two looks at whether all ranks are there, in seconds.
_PAUSE = 0.25
_meetings = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Where this process stands among those that torchrun or srun started."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Rank":
        """Read RANK, LOCAL_RANK and WORLD_SIZE; a process started alone is rank 0 of 1.

        A task of srun has its own names, which `mmcore.environment.name_rank` has translated when a verb began.
        """
        given = {field.name: os.environ.get(field.name.upper()) for field in fields(cls)}
        return cls(**{name: int(value) for name, value in given.items() if value is not None})


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Bring up the process group and megatron-core's parallel groups, and seed every generator.

    Args:
        parallel: layout; `parallel.data_parallel_size` has accepted the world size.
        seed: the same on all ranks; megatron-core derives a different one for each tensor rank.
    """
    rank, timeout = Rank.from_environment(), timedelta(minutes=parallel.distributed_timeout_minutes)
    host.set_device(rank.local_rank)
    backend = host.communication_backend(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if rank.world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timeout)
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Take everything down again; safe when nothing is up."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def meet() -> None:
    """Wait until all ranks have come here, for as long as that takes; all of them call it.

    For what one rank does alone, such as writing files or waiting for a scorer: a collective would give up on it after
    --parallel.distributed-timeout-minutes. A rank that is gone is for torchrun to notice, which ends the others.
    """
    world_size, pause = dist.get_world_size(), _PAUSE / 256
    if world_size == 1:
        return
    store, key = dist.distributed_c10d._get_default_store(), f"mmcore/meeting_{next(_meetings)}"
    here = store.add(key, 1)
    while here < world_size:
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE)
        here = store.add(key, 0)


def largest(values: Sequence[float]) -> list[float]:
    """Of each number the largest that a rank has; all ranks call it."""
    found = torch.tensor(values, dtype=torch.float64, device=host.device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def is_main() -> bool:
    """Whether this rank speaks for the whole run."""
    return not dist.is_initialized() or dist.get_rank() == 0


def data_parallel_rank() -> int:
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    return parallel_state.get_data_parallel_world_size()


def is_data_source() -> bool:
    """Whether this rank reads the data of its model replica."""
    in_stage = dist.get_rank(parallel_state.get_tensor_and_context_parallel_group())
    return in_stage == 0 and parallel_state.is_pipeline_first_stage()


def broadcast_in_replica(value: Any, first_stage_only: Collection[str] = ()) -> Any:
    """Give every rank of a model replica what its data source has: the first pipeline stage, then the others.

    Args:
        value: on the data source a slotted dataclass of tensors (on the CPU) and small objects, or any
            other object that pickles; ignored elsewhere.
        first_stage_only: tensors that later stages do not get, such as pictures; there their first dimension is 0.
    Returns:
        The same value on every rank of the replica, tensors on this rank's device.
    """
    if parallel_state.is_pipeline_first_stage():
        value = _broadcast(value, parallel_state.get_tensor_and_context_parallel_group(), ())
    return _broadcast(value, parallel_state.get_pipeline_model_parallel_group(), first_stage_only)


def broadcast_over_replicas(value: Any) -> Any:
    """Give every replica what the first one has, rank by rank; all ranks call it.

    Args:
        value: as of `broadcast_in_replica`, there on all ranks of the first replica.
    """
    return _broadcast(value, parallel_state.get_data_parallel_group(), ())


def _broadcast(value: Any, group: Any, withheld: Collection[str]) -> Any:
    """What the first rank of a group has, on all its ranks."""
    source, size = dist.get_global_rank(group, 0), dist.get_world_size(group)
    tensors: dict[str, torch.Tensor] = {}
    if dist.get_rank() == source and hasattr(value, "__dataclass_fields__"):
        parts = {name: getattr(value, name) for name in value.__dataclass_fields__}
        tensors = {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}
        rest = {name: part for name, part in parts.items() if name not in tensors}
        header: list[Any] = [(type(value), rest, {name: (part.shape, part.dtype) for name, part in tensors.items()})]
    else:
        header = [(None, value, {})]
    if size > 1:
        dist.broadcast_object_list(header, source, group)
    kind, rest, shapes = header[0]
    if kind is None:
        return rest
    received = {}
    for name, (shape, dtype) in shapes.items():
        if name in tensors:
            tensor = host.to_device(tensors[name].contiguous())
        else:
            shape = (0, *shape[1:]) if name in withheld else shape
            tensor = torch.empty(shape, dtype=dtype, device=host.device())
        if size > 1 and tensor.numel() and name not in withheld:
            dist.broadcast(tensor, source, group)
        received[name] = tensor
    return kind(**rest, **received)
