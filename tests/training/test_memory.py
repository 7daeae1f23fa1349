"""Bytes that are told are bytes that are allocated; and full tuning of a 7B model fits one GPU.

Mistral-7B with CLIP-L/14-336 and a projector of 14336, all 7.62e9 parameters trained in bf16 on one GPU, in GB:

    states  weights  gradients  masters  moments  in all  left of 141
    full       15.2       30.5     30.5     61.0   137.2          3.8
    lean       15.2       15.2     15.2     30.5    76.2         64.8
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.config import OptimizerConfig, ParallelConfig
from mmcore.models.architecture import ProjectorArch
from mmcore.models.pipeline import plan_layers
from mmcore.models.presets import LANGUAGE, VISION, compose
from mmcore.training import freezing
from mmcore.training.memory import check_host, host_memory, training_bytes
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import train_step
from tests import ranks, tiny
from tests.training.test_layouts import microbatches

GPU = 141e9


def allocated(parallel: ParallelConfig, precision: str, states: Any, freeze: tuple[str, ...]) -> dict[str, int]:
    """Bytes on this rank after one update, without the padding of the buffers."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    layers = plan_layers(tiny.architecture(), parallel)
    model = tiny.build(parallel, dtype=dtype, layers=layers).to(dtype)
    freezing.freeze(model, freeze)
    ddp = wrap(model, parallel, states)
    config = OptimizerConfig(lr=1e-3, states=states)
    optimizer = build_optimizer(config, ddp)
    train_step(ddp, optimizer, build_scheduler(config, optimizer, 10), microbatches())
    gradients = [parameter.main_grad for parameter in model.parameters() if parameter.requires_grad]
    buffers, padding = sum(buffer.grad_data.nbytes for buffer in ddp.buffers), 64 * len(gradients) + 256
    assert 0 <= buffers - sum(gradient.nbytes for gradient in gradients) <= padding * gradients[0].itemsize
    masters = moments = 0
    for parameter, state in optimizer.chained_optimizers[0].optimizer.state.items():
        if "master_param" in state or parameter.dtype != dtype:  # else the weight itself is updated
            masters += state.get("master_param", parameter).nbytes
        moments += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    cut = [parameter for parameter in model.parameters() if getattr(parameter, "tensor_model_parallel", False)]
    never = [
        parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and name.split(".")[0] not in freeze
    ]
    return {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "gradients": sum(gradient.nbytes for gradient in gradients),
        "masters": masters,
        "moments": moments,
        "whole": sum(parameter.numel() for parameter in model.parameters()) - sum(map(torch.numel, cut)),
        "never": sum(map(torch.numel, never)),
    }


CASES = [
    (ParallelConfig(), 1, "fp32", "full", ()),
    (ParallelConfig(), 1, "bf16", "full", ("vision_model",)),
    (ParallelConfig(), 2, "bf16", "lean", ()),
    (ParallelConfig(pipeline_model_parallel_size=2), 2, "bf16", "lean", ("vision_model", "vision_projection")),
]


@pytest.mark.parametrize(("parallel", "size", "precision", "states", "freeze"), CASES)
def test_bytes_are_those_allocated(
    parallel: ParallelConfig, size: int, precision: Any, states: Any, freeze: tuple[str, ...]
) -> None:
    found = ranks.run(allocated, parallel, size, parallel, precision, states, freeze)
    stages = parallel.pipeline_model_parallel_size
    told = training_bytes(
        tiny.architecture(),
        freeze,
        parallel,
        data_parallel_size=size // stages,
        layers=plan_layers(tiny.architecture(), parallel),
        precision=precision,
        states=states,
    )
    width = 2 if states == "lean" else 4  # of a gradient, a master and each moment
    for stage, one in enumerate(told):
        replicas = [found[stage]] if stages > 1 else found
        never = found[stage]["never"]  # layers of the tower that are counted, but do not run
        assert one.weights == replicas[0]["weights"] and one.gradients == replicas[0]["gradients"] + never * width
        for name, bytes_of_one in (("masters", 0 if precision == "fp32" else width), ("moments", 2 * width)):
            kept = sum(replica[name] for replica in replicas) + never * bytes_of_one
            assert kept <= getattr(one, name) * len(replicas) < kept + len(replicas) * max(1, bytes_of_one), name


def test_tensor_ranks_hold_their_share() -> None:
    """And what none of them can have a part of, which is told as if they could: norms, biases, the small tower's."""
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    (one,) = training_bytes(
        tiny.architecture(),
        (),
        parallel,
        data_parallel_size=1,
        layers=(tiny.LANGUAGE.num_layers,),
        precision="bf16",
        states="full",
    )
    for found in ranks.run(allocated, parallel, 2, parallel, "bf16", "full", ()):
        assert one.weights == pytest.approx(found["weights"] - found["whole"], abs=2)


def test_a_7b_model_is_tuned_on_one_gpu() -> None:
    """The numbers above; also what three more replicas leave of it."""
    projector = ProjectorArch(ffn_hidden_size=14336, add_bias_linear=False)
    architecture = compose(VISION["clip_vit_l_14_336"], LANGUAGE["mistral_7b_v03"], projector)
    found = {}
    for states, replicas in (("full", 1), ("lean", 1), ("full", 4)):
        (found[states, replicas],) = training_bytes(
            architecture,
            (),
            ParallelConfig(),
            data_parallel_size=replicas,
            layers=(32,),
            precision="bf16",
            states=states,
        )
    full, lean, dealt = found.values()
    parts = [(one.weights, one.gradients, one.masters, one.moments, one.total) for one in (full, lean)]
    rounded = [[round(part / 1e9, 1) for part in row] for row in parts]
    assert rounded == [[15.2, 30.5, 30.5, 61.0, 137.2], [15.2, 15.2, 15.2, 30.5, 76.2]]
    assert str(lean) == "76.2 GB (weights 15.2, gradients 15.2, optimizer 45.7)"
    assert GPU - lean.total > 40e9 > GPU - full.total
    assert dealt.total == pytest.approx(full.weights + full.gradients + (full.masters + full.moments) / 4, rel=1e-6)


def test_fp8_keeps_two_copies_of_the_layers_weights() -> None:
    arch = compose(VISION["clip_vit_l_14_336"], LANGUAGE["mistral_7b_v03"], ProjectorArch(ffn_hidden_size=14336))
    options = {"data_parallel_size": 1, "layers": [32], "precision": "bf16", "states": "lean"}
    (plain,), (both,) = (
        training_bytes(arch, (), ParallelConfig(), fp8=parts, **options)
        for parts in ((), ("language_model", "vision_model"))
    )
    layers = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096)
    assert both.total - plain.total == 2 * layers + 2 * 303_507_456  # of the tower all


def test_a_save_fits_the_machine() -> None:
    """Masters and moments lie evenly on all ranks, weights on the first replica's: of 2 stages its tensor ranks."""
    pair = ParallelConfig(tensor_model_parallel_size=2)
    both = replace(pair, pipeline_model_parallel_size=2)
    for parallel, world_size, local, needed in (
        (ParallelConfig(), 1, 1, 1_000 + 8_000),
        (ParallelConfig(), 4, 4, 1_000 + 8_000),
        (ParallelConfig(), 16, 4, 1_000 + 2_000),
        (pair, 16, 4, 1_000 + 2_000),
        (both, 16, 4, 500 + 2_000),  # the second stage's lie on another machine
        (both, 8, 8, 1_000 + 8_000),
    ):
        check_host(1_000, 8_000, parallel, world_size, local, needed)
        with pytest.raises(ValueError, match=rf"interval needs {needed / 1e9:.3g} GB of it for the {local} ranks of a"):
            check_host(1_000, 8_000, parallel, world_size, local, needed - 1)
    check_host(1_000, 8_000, pair, 2, 2, None)


def test_memory_of_a_machine(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None and (host_memory() or 0) > 1 << 28
    files = {"proc/meminfo": "MemTotal:        2000 kB\nMemFree: 1 kB\n", "sys/fs/cgroup/memory.max": "max\n"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    assert host_memory(tmp_path) == 2_048_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("900\n")
    assert host_memory(tmp_path) == 900
