"""Ranks that share each sequence: trained, validated, stored and resumed as one that has all of it.

Losses and gradients at once: tests/training/test_layouts.py. The cut itself: tests/data/test_context.py.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.config import EvalConfig, OptimizerConfig, ParallelConfig, RunConfig
from mmcore.data.batch import collate
from mmcore.models.architecture import Architecture, RotaryScaling, check_layout
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import forward_backward, train_step
from tests import ranks, tiny
from tests.models.test_pictures import ANYRES, SIZES, anyres_sample
from tests.training.test_batches import weighted
from tests.training.test_checkpoint import STEPS, run
from tests.training.test_layouts import CONTEXT


def test_resumes_bit_for_bit_and_at_other_layouts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    expected = ranks.run(partial(run, CONTEXT, tmp_path, resume=False, steps=2 * STEPS), CONTEXT, 2)[0][2 * STEPS :]
    for result in ranks.run(partial(run, CONTEXT, tmp_path, resume=True, steps=STEPS), CONTEXT, 2):
        assert result == expected
    for result in ranks.run(partial(run, ParallelConfig(), tmp_path, resume=True, steps=2), ParallelConfig(), 1):
        assert result == pytest.approx(expected[:4], rel=1e-4)


def results(layout: ParallelConfig, arch: Architecture) -> list[Any]:
    """Of a step and of what is validated after it: tiles with newlines, or samples of two sources with weights."""
    model = tiny.build(layout, arch=arch)
    ddp = wrap(model, layout)
    config = OptimizerConfig(lr=2e-3)
    optimizer = build_optimizer(config, ddp)
    scheduler = build_scheduler(config, optimizer, 10)
    if arch is ANYRES:
        samples = [anyres_sample(seed, size) for seed, size in enumerate(SIZES)]
        batches = [collate(samples[:3]), collate(samples[1:2]), collate(samples[3:])]
    else:
        batches = [
            replace(weighted(first, 3, first % 2), num_sources=2, sources=torch.tensor([0, 1, first % 2]))
            for first in (0, 3)
        ]
    result = train_step(ddp, optimizer, scheduler, batches)
    total, sources = forward_backward(ddp, batches, forward_only=True)
    return [result.total, *result.sources, total, *sources, result.grad_norm]


@pytest.mark.parametrize("arch", [ANYRES, tiny.architecture()], ids=["anyres", "weighted"])
def test_steps_and_validation(arch: Architecture) -> None:
    """Counts are equal, losses are within rounding."""
    *expected, norm = ranks.run(results, ParallelConfig(), 1, ParallelConfig(), arch)[0]
    for *found, found_norm in ranks.run(results, CONTEXT, 2, CONTEXT, arch):
        assert found_norm == pytest.approx(norm, rel=1e-5)
        for one, other in zip(found, expected, strict=True):
            assert replace(one, loss=0.0) == replace(other, loss=0.0)
            assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"6 ranks cannot be dealt to replicas of 4 .* x context 2\)"):
        replace(CONTEXT, tensor_model_parallel_size=2).data_parallel_size(6)
    assert replace(CONTEXT, tensor_model_parallel_size=2).data_parallel_size(8) == 2
    with pytest.raises(ValueError, match=r"--parallel.context-parallel-size must be above 0"):
        ParallelConfig(context_parallel_size=0)
    with pytest.raises(ValueError, match=r"--eval.task coco with --parallel.context-parallel-size 2"):
        RunConfig(parallel=CONTEXT, eval=EvalConfig(task="coco", data="x", interval=1)).check()
    for what, change in {
        "a sliding window of 5": {"sliding_window": 5},
        "dynamic rotary embeddings": {"rotary_scaling": RotaryScaling(rope_type="dynamic", factor=2.0)},
    }.items():
        arch = replace(tiny.architecture(), language=replace(tiny.LANGUAGE, **change))
        check_layout(arch, ParallelConfig())
        with pytest.raises(ValueError, match=rf"size 2 with a language model that has {what}"):
            check_layout(arch, CONTEXT)
