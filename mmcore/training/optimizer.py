"""DDP, the distributed AdamW and its schedule: megatron-core's, configured."""

from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mmcore.config import OptimizerConfig, ParallelConfig
from mmcore.models.llava import LlavaModel
from mmcore.training.freezing import is_named, named_parameters
from mmcore.training.lean_adam import LeanAdam


def wrap(
    model: LlavaModel, parallel: ParallelConfig | None = None, states: Literal["full", "lean"] = "full"
) -> DistributedDataParallel:
    """The model with its gradient buffers; what is frozen by now gets none.

    Args:
        parallel: what of the communication between replicas overlaps with computing; by default nothing.
        states: as of the optimizer; lean gradients are in the weights' precision.
    """
    parallel = parallel or ParallelConfig()
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=states == "full",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    ddp = DistributedDataParallel(model.config, config, model)
    if config.overlap_grad_reduce:
        model.config.no_sync_func = ddp.no_sync  # until the last micro batch
    return ddp


def gather_parameters(ddp: DistributedDataParallel) -> None:
    """Make every replica's parameters those of the last update, where the next forward pass would do it."""
    if ddp.ddp_config.overlap_param_gather:
        ddp.start_param_sync(force_sync=True)


def build_optimizer(config: OptimizerConfig, model: DistributedDataParallel) -> Any:
    """The distributed optimizer over this rank's trained parameters.

    Weight decay leaves norms and biases alone (mcore's rule: parameters of one dimension).
    """
    core = CoreOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=True,
    )
    if config.states == "lean":
        # Set here, since megatron-core takes them for Transformer Engine's alone when it makes its configuration.
        core.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        core.exp_avg_dtype = core.exp_avg_sq_dtype = torch.bfloat16
    optimizer = get_megatron_optimizer(core, [model], _overrides(config, core, model))
    if config.states == "lean":
        for inner in optimizer.chained_optimizers:
            if not inner.is_stub_optimizer:
                inner.optimizer = LeanAdam(inner.optimizer.param_groups)
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _overrides(config: OptimizerConfig, core: CoreOptimizerConfig, model: DistributedDataParallel) -> dict[Any, Any]:
    """What differs from parameter to parameter: mcore makes a group of those that it is the same for.

    A rate is a multiple of the schedule's, by which mcore also tells a checkpoint's groups apart.
    """
    rates: dict[float, set[int]] = {}
    for name, parameter in named_parameters(model.module):
        fitting = [rate for pattern, rate in config.module_rates().items() if is_named(name, pattern)]
        if fitting:
            rates.setdefault(fitting[-1] / config.lr, set()).add(id(parameter))
    overrides: dict[Any, Any] = dict(get_standard_config_overrides(core))
    for multiple, members in rates.items():
        predicate = ParamPredicate(f"lr x {multiple}", lambda parameter, members=members: id(parameter) in members)
        overrides[ParamKey(predicate=predicate)] = {"lr_mult": multiple}
    return overrides


def build_scheduler(config: OptimizerConfig, optimizer: Any, steps: int) -> OptimizerParamScheduler:
    """The learning rate of every step; a pure function of the step, so resuming is stepping there.

    Groups with a rate of their own (see `build_optimizer`) follow in proportion. The configuration
    counts, not what a checkpoint that was loaded before says.
    """
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = config.lr * group["lr_mult"], config.min_lr * group["lr_mult"]
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
