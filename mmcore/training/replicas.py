"""Whether the replicas of the model still agree: a machine that computes wrongly says nothing of it.

Their weights are the same, bit for bit: each updates its share of them, and all are handed round. And of the same
micro batch they compute the same gradient; on a CPU bit for bit, on a GPU but for the order of some sums. So a weight
that has changed in one rank's memory is found, which a frozen one would stay, and a rank that computes wrongly when it
is asked. What went wrong once, in a gradient that all have added up since, is not: all have it.
"""

import contextlib
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mmcore import distributed, host
from mmcore.data.batch import Batch
from mmcore.training.freezing import named_parameters
from mmcore.training.optimizer import gather_parameters
from mmcore.training.step import run_schedule
from mmcore.training.suspect import brief

# Of the gradients' norms on a GPU: far more than the order of sums makes of them, in bf16 too.
TOLERANCE = 0.05

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def disagreement(ddp: Any, batch: Batch, *, number: int = 1, has_history: bool = False) -> str:
    """Which ranks differ from the other replicas, and in what; "" where all agree. All ranks call it, after a step.

    Args:
        ddp: the model's wrapper; its gradients are of no use afterwards.
        batch: any micro batch of this replica; that of the first replica is computed by all of them.
        number: micro batches that a schedule needs at least.
        has_history: whether a pass changes those after it, as by delayed FP8 scales; then weights are compared alone.
    """
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)  # all that have these weights
    replicas = parallel_state.get_data_parallel_group()
    if dist.get_world_size(copies) == 1:
        return ""
    gather_parameters(ddp)
    names, sums = zip(*((name, _bits(parameter)) for name, parameter in named_parameters(ddp.module)), strict=True)
    rows = _gathered(torch.stack(sums), copies)
    if told := _told(odd_ones(rows), copies, f"in the weights, first of {_first_difference(names, rows)}"):
        return told
    if has_history or dist.get_world_size(replicas) == 1:
        return ""
    batch = distributed.broadcast_over_replicas(batch)
    rows = _gathered(_gradient(ddp, batch, number), replicas)
    odd = odd_ones(rows, 0.0 if rows.dtype == torch.int64 else TOLERANCE)
    return _told(odd, replicas, f"in the gradient that is computed of {brief(batch.keys)}")


def odd_ones(rows: Tensor, tolerance: float = 0.0) -> list[int]:
    """Rows that differ from most; all of them where no more than half agree.

    Args:
        rows: of each replica [replicas, numbers].
        tolerance: by which numbers may differ, in proportion.
    """
    if tolerance:
        rows = rows.nan_to_num(nan=-1.0, posinf=-2.0)  # which are alike where all have them
        difference = (rows[:, None] - rows[None]).abs()
        alike = (difference <= tolerance * torch.maximum(rows[:, None].abs(), rows[None].abs())).all(-1)
    else:
        alike = (rows[:, None] == rows[None]).all(-1)
    best = alike[int(alike.sum(-1).argmax())]
    if best.all():
        return []
    return [index for index, is_alike in enumerate(best.tolist()) if not is_alike or 2 * best.sum() <= len(rows)]


def _bits(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits, taken as whole numbers: one that changes shows."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def _gradient(ddp: Any, batch: Batch, number: int) -> Tensor:
    """Of a micro batch, as this rank computes it: int64 [1] of its bits, on a GPU float64 [1] of its squares."""
    config, before = ddp.module.config, (ddp.module.config.finalize_model_grads_func, ddp.module.config.no_sync_func)
    ddp.zero_grad_buffer()
    config.finalize_model_grads_func, config.no_sync_func = None, contextlib.nullcontext
    try:
        with ddp.no_sync():
            run_schedule(ddp, [batch] * number)
    finally:
        config.finalize_model_grads_func, config.no_sync_func = before
    gradients = [buffer.grad_data for buffer in ddp.buffers]
    parts = [_square(part) if host.has_cuda() else _bits(part) for part in gradients]
    empty = torch.zeros((), dtype=torch.float64 if host.has_cuda() else torch.int64, device=host.device())
    ddp.zero_grad_buffer()
    return torch.stack([empty, *parts]).sum(0, keepdim=True)


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).double() ** 2


def _gathered(own: Tensor, group: Any) -> Tensor:
    """Of all of a group, by its ranks: [ranks, numbers], on the host."""
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, own, group=group)
    return torch.stack(rows).cpu()


def _first_difference(names: Sequence[str], rows: Tensor) -> str:
    return next((name for name, column in zip(names, rows.T, strict=True) if (column != column[0]).any()), "")


def _told(odd: Sequence[int], group: Any, where: str) -> str:
    """The same on all ranks."""
    ranks = dist.get_process_group_ranks(group)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, ([ranks[index] for index in odd], where, socket.gethostname()))
    found = sorted({rank for of_rank, _, _ in gathered for rank in of_rank})
    if not found:
        return ""
    first = next(where for of_rank, where, _ in gathered if of_rank)
    named = brief([f"{rank} ({gathered[rank][2]})" for rank in found])
    if len(found) == 1:
        return f"rank {named} differs from the other replicas {first}"
    return f"ranks {named} differ from other replicas {first}"
