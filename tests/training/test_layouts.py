"""Every layout is the same model: losses and all gradients, over real gloo processes.

Tolerance: float32 sums in another order. Largest difference seen is 3e-7 of a gradient's largest
entry; 1e-5 leaves room for other BLAS builds and is far below what any wrong term would make.
"""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from mmcore.config import OptimizerConfig, ParallelConfig
from mmcore.training.loss import step_shares
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import forward_step, train_step
from tests import ranks, tiny

LAYOUTS = {
    "tp2": (ParallelConfig(tensor_model_parallel_size=2), 2),
    "pp2": (ParallelConfig(pipeline_model_parallel_size=2), 2),
    "tp2pp2": (ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 4),
    "dp2": (ParallelConfig(), 2),
}
MICROBATCHES = [(0, 2, 1), (2, 2, 1), (4, 2, 2), (6, 2, 0)]  # first sample, size, images a sample: uneven on purpose
FREEZES = {"none": (), "pretrain": ("vision_model", "language_model"), "sft": ("vision_model",)}


def microbatches() -> list[Any]:
    """This replica's share of the global batch."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [tiny.batch(*spec) for spec in MICROBATCHES[rank::size]]


def gradients(parallel: ParallelConfig) -> dict[str, Any]:
    """Loss and every gradient of this rank, with what is needed to put them together."""
    model = tiny.build(parallel)
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ddp.zero_grad_buffer()
    batches = microbatches()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[ddp],
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
    )
    total, _ = step_shares(sums, 1)
    found = {}
    for name, parameter in tiny.global_parameters(model):
        gradient = getattr(parameter, "main_grad", None)
        cut = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1
        stride = getattr(parameter, "partition_stride", 1)
        found[name] = (None if gradient is None else gradient.clone(), cut, stride)
    return {
        "loss": total.loss,
        "num_tokens": total.num_tokens,
        "gradients": found,
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
    }


def assembled(results: list[dict[str, Any]]) -> dict[str, torch.Tensor | None]:
    """Whole gradients from all ranks' parts; replicas of a part must be equal."""
    whole = {}
    ranked = sorted(results, key=lambda result: (result["data"], result["tensor"]))
    for name in {name for result in results for name in result["gradients"]}:
        parts = [result["gradients"][name] for result in ranked if name in result["gradients"] and result["data"] == 0]
        _, cut, stride = parts[0]
        tensors = [part[0] for part in parts]
        if tensors[0] is None:
            whole[name] = None
        elif cut < 0:
            for replica in tensors[1:]:
                torch.testing.assert_close(replica, tensors[0], rtol=1e-5, atol=1e-7)
            whole[name] = tensors[0]
        else:
            pieces = [tensor.chunk(stride, cut) for tensor in tensors]  # gate and up are cut one by one
            whole[name] = torch.cat([piece[index] for index in range(stride) for piece in pieces], cut)
    return whole


NEVER_RUN = ("vision_model.decoder.layers.2", "vision_model.ln_post")  # above the feature layer


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    result = ranks.run(gradients, ParallelConfig(), 1, ParallelConfig())[0]
    assert all(value[0] is not None for name, value in result["gradients"].items() if not name.startswith(NEVER_RUN))
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradients(name: str, reference: dict[str, Any]) -> None:
    layout, world_size = LAYOUTS[name]
    results = ranks.run(gradients, layout, world_size, layout)
    for result in results:
        assert result["num_tokens"] == reference["num_tokens"]
        assert result["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    whole = assembled(results)
    assert whole.keys() == reference["gradients"].keys()
    for key, (expected, *_) in reference["gradients"].items():
        if expected is None:
            assert whole[key] is None, key
            continue
        assert expected.abs().max() > 0, f"{key} has no gradient: the test would see nothing"
        error = (whole[key] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"{key}: {error:.1e}"


def losses(parallel: ParallelConfig, freeze: tuple[str, ...], steps: int) -> list[float]:
    model = tiny.build(parallel)
    model.freeze(freeze)
    ddp = wrap(model)
    optimizer = build_optimizer(OptimizerConfig(lr=2e-3, weight_decay=0.1), ddp)
    scheduler = build_scheduler(OptimizerConfig(lr=2e-3, lr_warmup_steps=2), optimizer, steps)
    results = []
    for _ in range(steps):
        batches = microbatches()
        results.append(train_step(ddp, optimizer, scheduler, batches))
    return [value for result in results for value in (result.total.loss, result.grad_norm)]


def bf16_losses(parallel: ParallelConfig) -> list[float]:
    model = tiny.build(parallel, dtype=torch.bfloat16).to(torch.bfloat16)
    model.freeze(FREEZES["sft"])
    ddp = wrap(model)
    optimizer = build_optimizer(OptimizerConfig(lr=2e-3), ddp)
    scheduler = build_scheduler(OptimizerConfig(lr=2e-3), optimizer, 10)
    assert all(group["params"][0].dtype == torch.float32 for group in optimizer.param_groups)  # the masters
    return [train_step(ddp, optimizer, scheduler, microbatches()).total.loss for _ in range(10)]


def test_training_in_bf16() -> None:
    """Follows fp32 within bf16's three digits, at two layouts."""
    expected = ranks.run(losses, ParallelConfig(), 1, ParallelConfig(), FREEZES["sft"], 10)[0][::2]
    for name in ("tp2", "dp2"):
        layout, world_size = LAYOUTS[name]
        for result in ranks.run(bf16_losses, layout, world_size, layout):
            assert result[0] == pytest.approx(expected[0], rel=0.02)
            assert result[-1] < 0.8 * result[0]


@pytest.mark.parametrize("freeze", FREEZES)
def test_training(freeze: str) -> None:
    """Ten steps of the distributed AdamW, clipped, with every way of freezing, on every layout."""
    expected = ranks.run(losses, ParallelConfig(), 1, ParallelConfig(), FREEZES[freeze], 10)[0]
    assert expected[-2] < expected[0]
    for name, (layout, world_size) in LAYOUTS.items():
        for result in ranks.run(losses, layout, world_size, layout, FREEZES[freeze], 10):
            assert result == pytest.approx(expected, rel=1e-4), name
