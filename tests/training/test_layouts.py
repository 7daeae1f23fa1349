"""Every layout is the same model: losses and all gradients, over real gloo processes.

Tolerance: float32 sums in another order. Largest difference seen is 3e-7 of a gradient's largest
entry; 1e-5 leaves room for other BLAS builds and is far below what any wrong term would make.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from mmcore import distributed
from mmcore.config import OptimizerConfig, ParallelConfig
from mmcore.training import freezing, optimizer
from mmcore.training.loss import step_shares, step_sums
from mmcore.training.optimizer import build_optimizer, build_scheduler, gather_parameters, wrap
from mmcore.training.step import forward_step, train_step
from tests import ranks, tiny

LAYOUTS = {
    "tp2": (ParallelConfig(tensor_model_parallel_size=2), 2),
    "pp2": (ParallelConfig(pipeline_model_parallel_size=2), 2),
    "tp2pp2": (ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 4),
    "dp2": (ParallelConfig(), 2),
}
SEQUENCE_PARALLEL = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
CONTEXT = ParallelConfig(context_parallel_size=2)
# Layout, ranks, what is computed again in the backward pass, layers of each stage.
VARIANTS = {
    **LAYOUTS,
    "tp2sp": (SEQUENCE_PARALLEL, 2),
    "tp2sp, full": (SEQUENCE_PARALLEL, 2, "full"),
    "tp2pp2sp, selective": (replace(SEQUENCE_PARALLEL, pipeline_model_parallel_size=2), 4, "selective"),
    "selective": (ParallelConfig(), 1, "selective"),
    "full": (ParallelConfig(), 1, "full"),
    "pp2, uneven": (ParallelConfig(pipeline_model_parallel_size=2), 2, "none", (1, 3)),
    "pp3, uneven": (ParallelConfig(pipeline_model_parallel_size=3), 3),
    "pp2vp2": (INTERLEAVED, 2),
    "cp2": (CONTEXT, 2),
    "cp3": (replace(CONTEXT, context_parallel_size=3), 3),
    "cp2dp2, full": (CONTEXT, 4, "full"),
    "tp2cp2sp": (replace(SEQUENCE_PARALLEL, context_parallel_size=2), 4),
    "pp2vp2cp2": (replace(INTERLEAVED, context_parallel_size=2), 4),
    "tp2pp2vp2sp, full": (replace(INTERLEAVED, tensor_model_parallel_size=2, sequence_parallel=True), 4, "full"),
}
MICROBATCHES = [(0, 2, 1), (2, 2, 1), (4, 2, 2), (6, 2, 0)]  # first sample, size, images a sample: uneven on purpose
FREEZES = {"none": (), "pretrain": ("vision_model", "language_model"), "sft": ("vision_model",)}


def microbatches() -> list[Any]:
    """This replica's share of the global batch."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [tiny.batch(*spec) for spec in MICROBATCHES[rank::size]]


def gradients(
    parallel: ParallelConfig, recompute: str = "none", layers: tuple[int, ...] = (), freeze: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Loss and every gradient of this rank, with what is needed to put them together."""
    model = tiny.build(parallel, recompute=recompute, layers=layers)
    freezing.freeze(model, freeze)
    runs: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name.endswith(("layers.0.mlp", "layers.0.self_attention")):
            module.register_forward_hook(lambda *_, name=name: runs.update([name]))
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = lambda chunks, *args, **groups: finalize_model_grads(
        [ddp], *args, **groups
    )
    ddp.zero_grad_buffer()
    batches = microbatches()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model.chunks],
        model=list(model.chunks),
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
    )
    total, _ = step_shares(step_sums(sums, 1).tolist())
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
        "runs": dict(runs),
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(with_context_parallel=True),
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


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients(name: str, reference: dict[str, Any]) -> None:
    layout, world_size, *options = VARIANTS[name]
    results = ranks.run(gradients, layout, world_size, layout, *options, timeout=30)
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


def test_rows_that_tensor_ranks_cannot_share() -> None:
    """Sequence parallelism has something to pad."""
    assert any(tiny.batch(*spec).tokens.shape[1] % 2 for spec in MICROBATCHES)


@pytest.mark.parametrize(("recompute", "again"), [("selective", {"mlp"}), ("full", {"mlp", "self_attention"})])
def test_recompute(recompute: str, again: set[str], reference: dict[str, Any]) -> None:
    result = ranks.run(gradients, ParallelConfig(), 1, ParallelConfig(), recompute)[0]
    assert len(reference["runs"]) == 4  # of both towers
    for name, count in reference["runs"].items():
        assert result["runs"][name] == count * (2 if name.rpartition(".")[2] in again else 1), name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_above_what_is_frozen(recompute: str, reference: dict[str, Any]) -> None:
    """Of the language model's first MLP, and all else that is trained."""
    frozen = ("vision_.*", r"language_model\.(embedding|.*layernorm|.*self_attention)")
    result = ranks.run(gradients, ParallelConfig(), 1, ParallelConfig(), recompute, (), frozen)[0]
    trained = {name for name, (gradient, *_) in result["gradients"].items() if gradient is not None}
    assert "language_model.decoder.layers.0.mlp.linear_fc1.weight" in trained
    for name in trained:
        expected = reference["gradients"][name][0]
        torch.testing.assert_close(result["gradients"][name][0], expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def overlapped(parallel: ParallelConfig) -> dict[str, Any]:
    """Three steps; the weights that a checkpoint would hold, and those after the wrapper is let go."""
    optimizer.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=10_000)
    model = tiny.build(parallel)
    ddp = wrap(model, parallel)
    adam = build_optimizer(OptimizerConfig(lr=2e-3, clip_grad=0), ddp)
    scheduler = build_scheduler(OptimizerConfig(lr=2e-3), adam, 10)
    trained = [train_step(ddp, adam, scheduler, microbatches()).total.loss for _ in range(3)]
    gather_parameters(ddp)
    saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained.append(train_step(ddp, adam, scheduler, microbatches()).total.loss)
    freezing.unwrap(ddp)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"losses": trained, "saved": saved, "kept": kept, "buckets": len(ddp.buffers[0].buckets)}


@pytest.mark.parametrize("names", [("overlap_grad_reduce",), ("overlap_grad_reduce", "overlap_param_gather")])
def test_overlap(names: tuple[str, ...]) -> None:
    """Nothing changes but when replicas talk: every bit is the same (without clipping, whose norm is a sum)."""
    expected = ranks.run(overlapped, ParallelConfig(), 2, ParallelConfig())[0]
    layout = ParallelConfig(**dict.fromkeys(names, True))
    for result in ranks.run(overlapped, layout, 2, layout, timeout=20):
        assert result["buckets"] > 1
        assert result["losses"] == expected["losses"]
        for kind in ("saved", "kept"):
            for name, weight in expected[kind].items():
                assert torch.equal(result[kind][name], weight), (kind, name)


def losses(parallel: ParallelConfig, freeze: tuple[str, ...], steps: int) -> list[float]:
    model = tiny.build(parallel)
    freezing.freeze(model, freeze)
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
    freezing.freeze(model, FREEZES["sft"])
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


def received() -> tuple[int, dict[str, Any], int]:
    """This rank's stage, what it has of a batch that the data source read, and the bytes that it got or sent."""
    batch = tiny.batch(0, 3, 2) if distributed.is_data_source() else None
    sizes = []
    send = torch.distributed.broadcast

    def counting(tensor: torch.Tensor, *args: Any) -> None:
        sizes.append(tensor.nbytes)
        send(tensor, *args)

    torch.distributed.broadcast = counting
    batch = distributed.broadcast_in_replica(batch, first_stage_only=("images",))
    found = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return parallel_state.get_pipeline_model_parallel_rank(), found, sum(sizes)


def test_later_stages_get_no_pictures() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    sent = tiny.batch(0, 3, 2)
    for stage, batch, num_bytes in ranks.run(received, layout, 4):
        images = batch.pop("images")
        assert torch.equal(images, sent.images[:0] if stage else sent.images)
        assert num_bytes < sent.images.nbytes or not stage
        for name, part in batch.items():
            expected = getattr(sent, name)
            assert torch.equal(part, expected) if isinstance(part, torch.Tensor) else part == expected, name
