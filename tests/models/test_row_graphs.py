"""The language model's layers as graphs: the same numbers as kernel by kernel, forward, back and after updates.

On a CPU a graph is the function itself; what surrounds it is what runs on a GPU: shapes that come again, weights whose
gradients are added inside, and DDP's hooks, which must neither add them again nor miss others.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from mmcore import host
from mmcore.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from mmcore.models import graphs
from mmcore.models.interleaved import build_model
from mmcore.models.llava import base_config
from mmcore.training import freezing
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import train_step
from tests import ranks, tiny

FREEZES = {
    "none": (),
    "pretrain": ("vision_model", "language_model"),
    "sft": ("vision_model",),
    "language": ("vision_model", "vision_projection"),
    "norms": ("vision_model", r"language_model\.(?!.*layernorm).*"),
}
# Of a step: shapes that come often, and one that comes once.
STEPS = [[(0, 2, 1), (2, 2, 1)], [(4, 2, 1), (20, 9, 0)], [(6, 2, 1), (8, 2, 1)], [(10, 2, 1), (12, 2, 1)]]


def trained(frozen: tuple[str, ...], *, in_graphs: bool, overlap: bool) -> tuple[list[tuple[float, float]], Any, int]:
    """Losses and gradient norms of some steps, the weights after them, and how many passes were graphs."""
    passes = 0
    forward = host.CapturedPass.forward

    def counted(self: host.CapturedPass, inputs: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return forward(self, inputs)

    host.CapturedPass.forward = counted  # type: ignore[method-assign]
    parallel = ParallelConfig(overlap_grad_reduce=overlap)
    source = tiny.build(parallel)
    base = base_config(parallel)
    model = build_model(tiny.architecture(), "local", language_graphs=in_graphs, **base)
    model.load_state_dict(source.state_dict())
    freezing.freeze(model, frozen)
    ddp = wrap(model, parallel)
    # Far above any gradient, so that the direction of the smallest, which rounding decides, is not a step of its own.
    config = OptimizerConfig(lr=1.0, min_lr=0.5, adam_eps=1.0, clip_grad=1.0)
    optimizer = build_optimizer(config, ddp)
    scheduler = build_scheduler(config, optimizer, len(STEPS))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found = []
    for step in STEPS:
        done = train_step(ddp, optimizer, scheduler, [tiny.batch(*spec) for spec in step][rank::size])
        found.append((done.total.loss, done.grad_norm))
    host.CapturedPass.forward = forward  # type: ignore[method-assign]
    return found, {name: weight.detach().clone() for name, weight in model.named_parameters()}, passes


def both(frozen: tuple[str, ...], overlap: bool) -> tuple[Any, Any, int]:
    numbers, weights, none = trained(frozen, in_graphs=False, overlap=overlap)
    others, moved, passes = trained(frozen, in_graphs=True, overlap=overlap)
    assert none == 0
    assert others == [pytest.approx(pair, rel=1e-5) for pair in numbers]
    furthest = max((moved[name] - weight).abs().max().item() for name, weight in weights.items())
    return numbers, furthest, passes


@pytest.mark.parametrize("name", FREEZES)
def test_the_same_steps(name: str) -> None:
    numbers, furthest, passes = ranks.run(both, ParallelConfig(), 1, FREEZES[name], False)[0]
    assert furthest < 2e-5, "Adam's first steps are as long for the smallest gradient"
    assert passes == 5, "of seven passes of one shape the first two are kernel by kernel, and one comes once"
    assert len({norm for _, norm in numbers}) == len(STEPS)


def test_replicas_reduce_what_graphs_have_added() -> None:
    """Each with one micro batch a step, its last: buckets are reduced as their gradients are told to be there."""
    found = ranks.run(both, ParallelConfig(), 2, FREEZES["none"], True)
    assert [passes for _, _, passes in found] == [2, 1] and all(furthest < 2e-5 for _, furthest, _ in found)


def test_where_they_can_be() -> None:
    whole = base_config(ParallelConfig())
    config = tiny_config(**whole)
    assert graphs.can_be_graphs(config)
    for change in (
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
        {"context_parallel_size": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    ):
        assert not graphs.can_be_graphs(tiny_config(**{**whole, **change})), change


def tiny_config(**base: Any) -> Any:
    from mmcore.models.language import language_config

    return language_config(tiny.LANGUAGE, **base)


def test_what_does_not_go_with_them() -> None:
    model = ModelConfig(language_graphs=True)
    RunConfig(model=model).check()
    for other, parallel in (
        ("tensor-model-parallel-size", ParallelConfig(tensor_model_parallel_size=2)),
        ("overlap-param-gather", ParallelConfig(overlap_param_gather=True, overlap_grad_reduce=True)),
    ):
        with pytest.raises(ValueError, match=f"language-graphs does not go with --parallel.{other}"):
            RunConfig(model=model, parallel=parallel).check()
    with pytest.raises(ValueError, match=r"language-graphs does not go with --model\.recompute"):
        RunConfig(model=replace(model, recompute="full")).check()


def test_what_a_graph_is_made_for() -> None:
    """Tokens and segments of the padded row, not what they hold."""

    def row(tokens: int, segments: int) -> graphs.Row:
        return graphs.Row(
            hidden=torch.zeros(tokens, 1, 2),
            angles=torch.zeros(1),
            cu_seqlens=torch.zeros(segments + 1, dtype=torch.int32),
            read=torch.zeros(4, dtype=torch.int64),
            longest=256,
        )

    assert row(512, 8).shape == row(512, 8).shape
    assert len({row(512, 8).shape, row(768, 8).shape, row(512, 16).shape}) == 3
