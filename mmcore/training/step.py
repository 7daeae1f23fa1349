"""One optimizer step over the micro batches of every replica and stage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mmcore.data.batch import Batch
from mmcore.training.loss import Share, step_shares, token_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did, the same on every rank."""

    total: Share
    sources: list[Share]
    """Of each source of the data, in the loader's order."""
    grad_norm: float
    """Before clipping."""


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """mcore's forward-step contract: this stage's output, and what turns it into a loss."""
    batch = next(batches)
    output = model(
        batch.tokens,
        batch.images,
        image_sources=batch.image_sources,
        labels=batch.labels,
        positions=batch.loss_positions,
        packed_seq_params=packed_seq_params(batch),
    )
    return output, partial(token_loss, batch)


def packed_seq_params(batch: Batch) -> PackedSeqParams:
    """Where the samples of a batch begin, as mcore's attention and rotary embeddings take it."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def train_step(model: DistributedDataParallel, optimizer: Any, scheduler: Any, batches: Sequence[Batch]) -> StepResult:
    """Forward, backward, reduce, update.

    Args:
        batches: of this replica; on every rank of it the same ones.
    Raises:
        FloatingPointError: the gradient is not finite; the weights are not to be kept.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        # Micro batches tell their own shapes (variable_seq_lengths); mcore wants the arguments all the same.
        seq_length=1,
        micro_batch_size=1,
    )
    total, sources = step_shares(sums, batches[0].num_sources)
    updated, grad_norm, _ = optimizer.step()
    if not updated or not grad_norm < float("inf"):
        raise FloatingPointError(f"the gradient is not finite (norm {grad_norm}, loss {total.loss})")
    scheduler.step(increment=1)
    return StepResult(total=total, sources=sources, grad_norm=float(grad_norm))
