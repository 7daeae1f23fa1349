"""The loss of a step: the sum over its trained tokens by weight, divided once by the sum of their weights."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from mmcore import host
from mmcore.data.batch import Batch
from mmcore.models.flops import Work


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
    num_images: int = 0
    """Squares that the vision tower saw."""
    num_pairs: float = 0.0
    """Of positions that attend to each other, as `mmcore.models.flops.causal_pairs` counts them."""

    @classmethod
    def from_sums(
        cls,
        loss: float,
        weight: float,
        num_tokens: float,
        num_samples: float,
        num_positions: float,
        num_images: float,
        num_pairs: float,
    ) -> "Share":
        return cls(
            loss=loss / weight if weight else 0.0,
            num_tokens=int(num_tokens),
            num_samples=int(num_samples),
            num_positions=int(num_positions),
            num_images=int(num_images),
            num_pairs=num_pairs,
        )

    @property
    def work(self) -> Work:
        """What it takes to compute it."""
        return Work(
            num_images=self.num_images,
            num_positions=self.num_positions,
            num_pairs=self.num_pairs,
            num_labels=self.num_tokens,
        )

    def row(self) -> dict[str, float]:
        """For the log."""
        return {name: value for name, value in asdict(self).items() if name != "num_pairs"}


def token_loss(batch: Batch, losses: Tensor, *, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """mcore's contract under `calculate_per_token_loss`.

    Args:
        batch: with the trained positions of this context rank.
        losses: float32 [t], at `batch.loss_positions`.
        window: positions that one sees, itself included; all before it if None.
    Returns:
        Sum to differentiate, token count (int32; see `mean_by_weight`), and for the log float64
        [num_sources, 7]: of each source its sum, the weights, trained tokens, samples, all positions, images and
        pairs of positions.
    """
    weights = batch.loss_mask.flatten()[batch.loss_positions]  # float32 [t]
    losses = losses * weights
    # Filled on the device: a number that is brought there makes the host wait.
    count = torch.full((), len(batch.loss_positions), dtype=torch.int, device=losses.device)
    sample = torch.searchsorted(batch.cu_seqlens.long(), batch.loss_positions, right=True) - 1  # int64 [t]
    token_sources = batch.sources[sample]
    sums = torch.zeros(7, batch.num_sources, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, token_sources, losses.detach().double())
    sums[1].index_add_(0, token_sources, weights.double())
    sums[2].index_add_(0, token_sources, torch.ones_like(token_sources, dtype=torch.float64))
    if parallel_state.get_context_parallel_rank() == 0:  # the others have the same samples
        sums[3].index_add_(0, batch.sources, torch.ones_like(batch.sources, dtype=torch.float64))
        lengths = batch.cu_seqlens.diff().double()  # [b]
        seen = lengths if window is None else lengths.clamp(max=window)  # by the last position
        sums[4].index_add_(0, batch.sources, lengths)
        sums[5].index_add_(0, batch.sources, batch.num_images.double())
        sums[6].index_add_(0, batch.sources, seen * (lengths - seen / 2))
    return losses.sum(), count, sums.T.contiguous()


def mean_by_weight(batches: Sequence[Batch]) -> Callable[..., None]:
    """mcore's finalize_model_grads, which divides the gradients by the weights of the global batch.

    mcore's schedules add up what it is to divide by as whole numbers, which weights are not; and before it divides,
    mcore asks the device whether there are any. So all but the division is its own.

    Args:
        batches: of this replica's step.
    """
    weights = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()

    def finalize(model: list[Any], num_tokens: Tensor, **groups: Any) -> None:
        finalize_model_grads(model, None, **groups)
        # All stages and context ranks of a replica have the same batches.
        dist.all_reduce(weights, group=parallel_state.get_data_parallel_group())
        factor = 1.0 / (weights + (weights == 0))  # without any weight all gradients are 0
        for chunk in model:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                scale_by(buffer.grad_data, factor.float())

    return finalize


def scale_by(gradients: Tensor, factor: Tensor) -> None:
    """Multiply in place by a float32 number that only the device knows.

    torch would round it to the gradients' precision first: in bf16 by up to 1 in 256.

    Args:
        gradients: [n], float32 or bf16.
    """
    for part in gradients.split(1 << 26):
        torch._foreach_mul_([wide := part.float()], factor)  # faster than `mul_` of a number on the device
        if wide is not part:
            part.copy_(wide)


def step_sums(sums: Sequence[Tensor], num_sources: int) -> Tensor:
    """What a step came to over all replicas, on this rank's device: float64 [num_sources, 7].

    Args:
        sums: the same of each micro batch on the last pipeline stage; empty on the others.
    """
    if sums:
        total = torch.stack(list(sums)).sum(0)
    else:
        total = torch.zeros(num_sources, 7, dtype=torch.float64, device=host.device())
    if parallel_state.is_pipeline_last_stage():
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.broadcast(
        total,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    return total


def step_shares(sums: Sequence[Sequence[float]]) -> tuple[Share, list[Share]]:
    """A whole step, and each source's share of it.

    Args:
        sums: seven numbers of each source, as `step_sums` gives them.
    """
    return Share.from_sums(*map(sum, zip(*sums, strict=True))), [Share.from_sums(*row) for row in sums]
