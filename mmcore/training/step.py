"""One optimizer step over the micro batches of every replica and stage."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, l2_norm_impl, multi_tensor_applier
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mmcore import host
from mmcore.config import TrainConfig
from mmcore.data.batch import Batch
from mmcore.data.context import context_part
from mmcore.models.sequence_parallel import packed_segments
from mmcore.training.loss import Share, mean_by_weight, step_shares, step_sums, token_loss
from mmcore.training.marks import at_batch
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
    is_asked: bool = False
    """Whether some rank was asked to end the run."""
    bad: tuple[int, ...] = ()
    """Of a faulty step, this replica's micro batches whose loss is not finite, where the last stage of it is."""


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """mcore's forward-step contract: this stage's output, and what turns it into a loss."""
    part = batch = next(batches)
    size = parallel_state.get_context_parallel_world_size()
    if size > 1:
        config = model.config
        multiple = 2 * size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        rank = parallel_state.get_context_parallel_rank()
        part, batch = context_part(batch, model.image_token_id, rank, size, multiple)
    output = model(
        part.tokens,
        part.images,
        image_sources=part.image_sources,
        image_positions=part.image_positions,
        labels=part.labels,
        positions=part.loss_positions,
        packed_seq_params=packed_seq_params(part),
    )
    window = model.config.window_size
    return output, partial(token_loss, batch, window=None if window is None else window[0] + 1)


def packed_seq_params(batch: Batch) -> PackedSeqParams:
    """Where the samples of a batch begin, as mcore's attention and rotary embeddings take it."""
    return packed_segments(batch.cu_seqlens, batch.max_seqlen)


def forward_backward(
    model: DistributedDataParallel, batches: Sequence[Batch], *, forward_only: bool = False
) -> tuple[Share, list[Share]]:
    """Micro batches through all stages; the gradients are summed unless `forward_only`.

    Returns:
        What they came to over all replicas: in all, and of each source of the data.
    """
    sums, _ = _forward_backward(model, batches, forward_only=forward_only)
    return step_shares(sums.tolist())


def _forward_backward(
    model: DistributedDataParallel,
    batches: Sequence[Batch],
    *,
    forward_only: bool = False,
    mark: Callable[[str], None] | None = None,
    meanwhile: Callable[[int], object] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The same, as `step_sums` gives it and as it takes it.

    Args:
        mark, meanwhile: as `train_step`.
    """
    if not forward_only:
        reduce = mean_by_weight(batches)

        def finalize(chunks: Any, weights: Tensor, **groups: Any) -> None:
            (mark or _nothing)("communication")
            reduce([model], weights, **groups)
            (mark or _nothing)("rest")

        model.config.finalize_model_grads_func = finalize
    sums = run_schedule(model, batches, forward_only=forward_only, meanwhile=meanwhile)
    return step_sums(sums, batches[0].num_sources), sums


def run_schedule(
    model: DistributedDataParallel,
    batches: Sequence[Batch],
    *,
    forward_only: bool = False,
    meanwhile: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """mcore's schedule over this replica's stages; what replicas do together is what the configuration says.

    Returns:
        What `token_loss` has for the log, of each micro batch; on the last stage alone.
    """
    chunks: Any = list(model.module.chunks)
    sums: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[handed_out(batches, meanwhile) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        # Micro batches tell their own shapes (variable_seq_lengths); mcore wants the arguments all the same.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return sums


def handed_out(batches: Sequence[Batch], meanwhile: Callable[[int], object] | None = None) -> Iterator[Batch]:
    """The batches, one by one; before each `meanwhile` is told how many are on their way.

    Not where pipeline stages wait for each other: what ranks do together must be at one place in the step.
    """
    is_alone = parallel_state.get_pipeline_model_parallel_world_size() == 1
    for number, batch in enumerate(batches):
        if meanwhile and is_alone:
            meanwhile(number)
        at_batch(number, len(batches), batch.keys)
        yield batch


def _nothing(name: str) -> None:
    """Nobody watches the time."""


def squared_norm(optimizer: Any, asked: object) -> Tensor:
    """Of the gradients of all ranks, and how many of them are asked to end: float32 [2].

    mcore's own sums and kernels, but for its last line, which reads the number.
    Source: get_grad_norm_fp32 in megatron/core/optimizer/clip_grads.py at 0.16.1.
    """
    gradients = [part for one in optimizer.chained_optimizers for part in one.get_main_grads_for_grad_norm()]
    norm = torch.zeros(1, device=host.device())
    if gradients:
        overflow = torch.zeros(1, dtype=torch.int, device=host.device())
        norm, _ = multi_tensor_applier(l2_norm_impl, overflow, [gradients], False)  # not one for each of them
    squared = torch.cat([norm**2, torch.full((1,), float(bool(asked)), device=norm.device)])
    dist.all_reduce(squared, group=optimizer.get_grad_stats_parallel_group())
    return squared


def train_step(
    model: DistributedDataParallel,
    optimizer: Any,
    scheduler: Any,
    batches: Sequence[Batch],
    judge: Callable[[float, float], str] | None = None,
    meanwhile: Callable[[int], object] | None = None,
    mark: Callable[[str], None] | None = None,
    asked: Callable[[], object] | None = None,
) -> StepResult:
    """Forward, backward, reduce, update.

    On a GPU the host runs ahead of it and waits for it once: between the backward pass and the update it reads what
    the step came to, all numbers in one. The judge needs them before any weight changes, and the clip takes the norm.

    Args:
        batches: of this replica; on every rank of it the same ones.
        judge: says what is wrong with the loss and the gradient's norm, "" for nothing, before any weight
            changes; alike on all ranks. By default what `BadSteps` says to a run that accepts all that is finite.
        meanwhile: what the host does beside the GPU, such as reading the next step's batches; told how many micro
            batches of this step are on their way, of which the last call hears of all.
        mark: told what begins, as `mmcore.training.timing.ModuleTimes.mark`.
        asked: whether this rank is asked to end the run.
    """
    mark = mark or _nothing
    mark("rest")
    model.zero_grad_buffer()
    optimizer.zero_grad()
    sums, of_batches = _forward_backward(model, batches, mark=mark, meanwhile=meanwhile)  # float64 [num_sources, 7]
    mark("optimizer")
    optimizer.prepare_grads()
    numbers = torch.cat([sums.flatten(), squared_norm(optimizer, asked and asked()).double()])
    if meanwhile:
        mark("data")
        meanwhile(len(batches))
        mark("optimizer")
    *values, squared, num_asked = numbers.tolist()  # the host waits here, and nowhere else
    width = sums.shape[1]
    total, sources = step_shares([values[start : start + width] for start in range(0, len(values), width)])
    grad_norm = math.sqrt(squared)
    fault = (judge or BadSteps(TrainConfig()).fault)(total.loss, grad_norm)
    if not fault:
        if optimizer.config.clip_grad > 0 and not optimizer.is_stub_optimizer:
            is_lean = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(optimizer.get_parameters(), optimizer.config.clip_grad, grad_norm, is_lean)
        optimizer.step_with_ready_grads()
    scheduler.step(increment=1)
    mark("rest")
    bad = [index for index, one in enumerate(of_batches) if fault and not one.isfinite().all()]
    return StepResult(
        total=total, sources=sources, grad_norm=grad_norm, fault=fault, is_asked=num_asked > 0, bad=tuple(bad)
    )
