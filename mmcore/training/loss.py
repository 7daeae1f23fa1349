"""The loss of a step: the sum over its trained tokens, divided once by their number."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mmcore import host
from mmcore.data.batch import Batch


def token_loss(batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mcore's contract under `calculate_per_token_loss`.

    Args:
        losses: float32 [t], at `batch.loss_positions`.
    Returns:
        Sum to differentiate, token count (int32), and both together as float32 [2] for the log.
    """
    total = (losses * batch.loss_mask.flatten()[batch.loss_positions]).sum()
    count = torch.tensor(len(batch.loss_positions), dtype=torch.int, device=losses.device)
    return total, count, torch.stack([total.detach(), count.to(total.dtype)])


def step_mean(sums: list[Tensor]) -> tuple[float, int]:
    """Loss of a whole step and its trained tokens, the same on every rank.

    Args:
        sums: float32 [2] of each micro batch on the last pipeline stage; empty on the others.
    """
    total = torch.stack(sums).sum(0) if sums else torch.zeros(2, device=host.device())
    if parallel_state.is_pipeline_last_stage():
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    dist.broadcast(
        total,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    loss, count = total.tolist()
    return loss / max(count, 1), int(count)
