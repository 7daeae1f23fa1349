"""The loss of a step: the sum over its trained tokens by weight, divided once by the sum of their weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from mmcore import host
from mmcore.data.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a step, or one source of its data, came to."""

    loss: float
    """Mean over its trained tokens, by their weights; 0 where there are none."""
    num_tokens: int
    """That were trained."""
    num_samples: int
    num_positions: int
    """Of all sequences, pictures and what is not trained included."""

    @classmethod
    def from_sums(
        cls, loss: float, weight: float, num_tokens: float, num_samples: float, num_positions: float
    ) -> "Share":
        return cls(
            loss=loss / weight if weight else 0.0,
            num_tokens=int(num_tokens),
            num_samples=int(num_samples),
            num_positions=int(num_positions),
        )


def token_loss(batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mcore's contract under `calculate_per_token_loss`.

    Args:
        batch: with the trained positions of this context rank.
        losses: float32 [t], at `batch.loss_positions`.
    Returns:
        Sum to differentiate, token count (int32; see `mean_by_weight`), and for the log float64
        [num_sources, 5]: of each source its sum, the weights, trained tokens, samples and all positions.
    """
    weights = batch.loss_mask.flatten()[batch.loss_positions]  # float32 [t]
    losses = losses * weights
    count = torch.tensor(len(batch.loss_positions), dtype=torch.int, device=losses.device)
    sample = torch.searchsorted(batch.cu_seqlens.long(), batch.loss_positions, right=True) - 1  # int64 [t]
    token_sources = batch.sources[sample]
    sums = torch.zeros(5, batch.num_sources, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, token_sources, losses.detach().double())
    sums[1].index_add_(0, token_sources, weights.double())
    sums[2].index_add_(0, token_sources, torch.ones_like(token_sources, dtype=torch.float64))
    if parallel_state.get_context_parallel_rank() == 0:  # the others have the same samples
        sums[3].index_add_(0, batch.sources, torch.ones_like(batch.sources, dtype=torch.float64))
        sums[4].index_add_(0, batch.sources, batch.cu_seqlens.diff().double())
    return losses.sum(), count, sums.T.contiguous()


def mean_by_weight(batches: Sequence[Batch]) -> Callable[..., None]:
    """mcore's finalize_model_grads, which divides the gradients by the weights of the global batch.

    mcore's schedules add up what it is to divide by as whole numbers, which weights are not. Its division
    itself takes any number: summed over the replicas and their context ranks, of each that of the last pipeline stage.

    Args:
        batches: of this replica's step.
    """
    weights = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
    if parallel_state.get_context_parallel_rank() > 0:  # which have the same batches
        weights = torch.zeros_like(weights)

    def finalize(model: list[Any], num_tokens: Tensor, **groups: Any) -> None:
        finalize_model_grads(model, weights, **groups)

    return finalize


def step_shares(sums: Sequence[Tensor], num_sources: int) -> tuple[Share, list[Share]]:
    """A whole step, and each source's share of it, the same on every rank.

    Args:
        sums: float64 [num_sources, 5] of each micro batch on the last pipeline stage; empty on the others.
    """
    total = torch.stack(list(sums)).sum(0) if sums else torch.zeros(num_sources, 5, dtype=torch.float64)
    total = total.to(host.device())
    if parallel_state.is_pipeline_last_stage():
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.broadcast(
        total,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    return Share.from_sums(*total.sum(0).tolist()), [Share.from_sums(*row) for row in total.tolist()]
