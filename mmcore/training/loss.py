"""The loss of a step: the sum over its trained tokens, divided once by their number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mmcore import host
from mmcore.data.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a step, or one source of its data, came to."""

    loss: float
    """Mean over its trained tokens; 0 where there are none."""
    num_tokens: int
    """That were trained."""
    num_samples: int
    num_positions: int
    """Of all sequences, pictures and what is not trained included."""

    @classmethod
    def from_sums(cls, loss: float, num_tokens: float, num_samples: float, num_positions: float) -> "Share":
        return cls(
            loss=loss / max(num_tokens, 1),
            num_tokens=int(num_tokens),
            num_samples=int(num_samples),
            num_positions=int(num_positions),
        )


def token_loss(batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mcore's contract under `calculate_per_token_loss`.

    Args:
        losses: float32 [t], at `batch.loss_positions`.
    Returns:
        Sum to differentiate, token count (int32), and for the log float64 [num_sources, 4]: of each
        source its sum, its trained tokens, its samples and all its positions.
    """
    losses = losses * batch.loss_mask.flatten()[batch.loss_positions]
    count = torch.tensor(len(batch.loss_positions), dtype=torch.int, device=losses.device)
    sample = torch.searchsorted(batch.cu_seqlens.long(), batch.loss_positions, right=True) - 1  # int64 [t]
    token_sources = batch.sources[sample]
    sums = torch.zeros(4, batch.num_sources, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, token_sources, losses.detach().double())
    sums[1].index_add_(0, token_sources, torch.ones_like(token_sources, dtype=torch.float64))
    sums[2].index_add_(0, batch.sources, torch.ones_like(batch.sources, dtype=torch.float64))
    sums[3].index_add_(0, batch.sources, batch.cu_seqlens.diff().double())
    return losses.sum(), count, sums.T.contiguous()


def step_shares(sums: Sequence[Tensor], num_sources: int) -> tuple[Share, list[Share]]:
    """A whole step, and each source's share of it, the same on every rank.

    Args:
        sums: float64 [num_sources, 4] of each micro batch on the last pipeline stage; empty on the others.
    """
    total = torch.stack(list(sums)).sum(0) if sums else torch.zeros(num_sources, 4, dtype=torch.float64)
    total = total.to(host.device())
    if parallel_state.is_pipeline_last_stage():
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    dist.broadcast(
        total,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    return Share.from_sums(*total.sum(0).tolist()), [Share.from_sums(*row) for row in total.tolist()]
