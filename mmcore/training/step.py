"""One optimizer step over the micro batches of every replica and stage."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mmcore.config import TrainConfig
from mmcore.data.batch import Batch
from mmcore.training.loss import Share, step_shares, token_loss
from mmcore.training.policy import BadSteps


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did, the same on every rank."""

    total: Share
    sources: list[Share]
    """Of each source of the data, in the loader's order."""
    grad_norm: float
    """Before clipping."""
    fault: str = ""
    """Why the weights were left alone; "" where they were updated."""


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


def forward_backward(
    model: DistributedDataParallel, batches: Sequence[Batch], *, forward_only: bool = False
) -> tuple[Share, list[Share]]:
    """Micro batches through all stages; the gradients are summed unless `forward_only`.

    Returns:
        What they came to over all replicas: in all, and of each source of the data.
    """
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        # Micro batches tell their own shapes (variable_seq_lengths); mcore wants the arguments all the same.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return step_shares(sums, batches[0].num_sources)


def train_step(
    model: DistributedDataParallel,
    optimizer: Any,
    scheduler: Any,
    batches: Sequence[Batch],
    judge: Callable[[float, float], str] | None = None,
) -> StepResult:
    """Forward, backward, reduce, update.

    Args:
        batches: of this replica; on every rank of it the same ones.
        judge: says what is wrong with the loss and the gradient's norm, "" for nothing, before any weight
            changes; alike on all ranks. By default what `BadSteps` says to a run that accepts all that is finite.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    total, sources = forward_backward(model, batches)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    fault = (judge or BadSteps(TrainConfig()).fault)(total.loss, grad_norm)
    if not fault:
        if optimizer.config.clip_grad > 0 and not optimizer.is_stub_optimizer:
            clip_grad_by_total_norm_fp32(optimizer.get_parameters(), optimizer.config.clip_grad, grad_norm)
        optimizer.step_with_ready_grads()
    scheduler.step(increment=1)
    return StepResult(total=total, sources=sources, grad_norm=grad_norm, fault=fault)
