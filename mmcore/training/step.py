"""One optimizer step over the micro batches of every replica and stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mmcore.data.batch import Batch
from mmcore.training.loss import step_mean, token_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did, the same on every rank."""

    loss: float
    num_tokens: int
    """Trained tokens of the global batch."""
    grad_norm: float
    """Before clipping."""


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """mcore's forward-step contract: this stage's output, and what turns it into a loss."""
    batch = next(batches)
    output = model(
        batch.tokens,
        batch.images,
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


def train_step(
    model: DistributedDataParallel, optimizer: Any, scheduler: Any, batches: Iterator[Batch], num_microbatches: int
) -> StepResult:
    """Forward, backward, reduce, update.

    Args:
        batches: gives `num_microbatches` batches; on every rank of a replica the same ones.
    Raises:
        FloatingPointError: the gradient is not finite; the weights are not to be kept.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=num_microbatches,
        # Micro batches tell their own shapes (variable_seq_lengths); mcore wants the arguments all the same.
        seq_length=1,
        micro_batch_size=1,
    )
    loss, num_tokens = step_mean(sums)
    updated, grad_norm, _ = optimizer.step()
    if not updated or not grad_norm < float("inf"):
        raise FloatingPointError(f"the gradient is not finite (norm {grad_norm}, loss {loss})")
    scheduler.step(increment=1)
    return StepResult(loss=loss, num_tokens=num_tokens, grad_norm=float(grad_norm))
