"""Several chunks of layers on each stage: trained, stored, resumed and asked as any other layout.

Losses and gradients at once: tests/training/test_layouts.py.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmcore.config import OptimizerConfig, ParallelConfig, TrainConfig
from mmcore.models.architecture import ProjectorArch, check_layout
from mmcore.models.pipeline import plan_layers, stage_layers
from mmcore.models.presets import LANGUAGE, VISION, compose
from mmcore.training import freezing
from mmcore.training.optimizer import build_optimizer, build_scheduler, gather_parameters, wrap
from mmcore.training.step import forward_backward, train_step
from tests import ranks, tiny
from tests.inference.test_generator import ours, plain
from tests.training.test_checkpoint import STEPS, run
from tests.training.test_layouts import FREEZES, INTERLEAVED, losses, microbatches

PP2 = ParallelConfig(pipeline_model_parallel_size=2)
TIED = replace(tiny.architecture(), language=replace(tiny.LANGUAGE, share_embeddings_and_output_weights=True))


def saved(layout: ParallelConfig, world_size: int, folder: Path, freeze: tuple[str, ...]) -> Any:
    (folder / "tokenizer").mkdir()
    return ranks.run(partial(run, layout, folder, resume=False, steps=2 * STEPS, freeze=freeze), layout, world_size)[0]


def test_resumes_bit_for_bit_and_at_other_layouts(tmp_path: Path) -> None:
    """All is trained, and one layer of the tower has no optimizer state. Tolerance as of test_checkpoint.py."""
    expected = saved(INTERLEAVED, 2, tmp_path, ())[2 * STEPS :]
    for result in ranks.run(lambda: run(INTERLEAVED, tmp_path, resume=True, steps=STEPS, freeze=()), INTERLEAVED, 2):
        assert result == expected
    for layout, world_size in [(ParallelConfig(), 1), (PP2, 2)]:
        go_on = partial(run, layout, tmp_path, resume=True, steps=2, freeze=())
        for result in ranks.run(go_on, layout, world_size):
            assert result == pytest.approx(expected[:4], rel=1e-4)


def test_resumes_what_another_layout_wrote(tmp_path: Path) -> None:
    expected = saved(ParallelConfig(), 1, tmp_path, ("vision_model",))[2 * STEPS : 2 * STEPS + 4]
    for result in ranks.run(lambda: run(INTERLEAVED, tmp_path, resume=True, steps=2), INTERLEAVED, 2):
        assert result == pytest.approx(expected, rel=1e-4)


def test_alignment() -> None:
    """Chunks that train nothing pass gradients on to the projector, which the first chunk alone has."""
    expected = ranks.run(losses, ParallelConfig(), 1, ParallelConfig(), FREEZES["pretrain"], 3)[0]
    for result in ranks.run(losses, INTERLEAVED, 2, INTERLEAVED, FREEZES["pretrain"], 3, timeout=30):
        assert result == pytest.approx(expected, rel=1e-4)


def trained(layout: ParallelConfig, arch: Any = None) -> dict[str, Any]:
    """Losses of three steps, one without an update, and the weights after the wrapper is let go."""
    model = tiny.build(layout, arch=arch)
    ddp = wrap(model, layout)
    adam = build_optimizer(OptimizerConfig(lr=2e-3, clip_grad=0, module_lr=("vision_projection=1e-3",)), ddp)
    scheduler = build_scheduler(OptimizerConfig(lr=2e-3), adam, 10)
    losses = [train_step(ddp, adam, scheduler, microbatches()).total.loss for _ in range(3)]
    gather_parameters(ddp)
    losses.append(forward_backward(ddp, microbatches(), forward_only=True)[0].loss)
    freezing.unwrap(ddp)
    return {"losses": losses, "names": sorted(name for name, _ in freezing.named_parameters(model))}


def test_tied_embeddings_and_names() -> None:
    """The first chunk of the first stage and the last of the last have the embedding, others of these stages not."""
    expected = ranks.run(trained, ParallelConfig(), 1, ParallelConfig(), TIED)[0]
    results = ranks.run(trained, INTERLEAVED, 2, INTERLEAVED, TIED, timeout=30)
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert {name for result in results for name in result["names"]} - set(expected["names"]) == {
        "language_model.output_layer.weight"  # mcore's copy
    }


def test_overlapped_with_communication() -> None:
    layout = replace(INTERLEAVED, overlap_grad_reduce=True, overlap_param_gather=True)
    expected = ranks.run(trained, INTERLEAVED, 4, INTERLEAVED, timeout=30)[0]
    for result in ranks.run(trained, layout, 4, layout, timeout=30):
        assert result["losses"] == expected["losses"]


def test_answers() -> None:
    expected = ranks.run(plain, ParallelConfig(), 1)[0]
    for answers, _ in ranks.run(ours, INTERLEAVED, 2, INTERLEAVED, -1, 8, timeout=30):
        assert answers == expected


def chunks(layers: tuple[int, ...]) -> list[tuple[list[int], bool, bool]]:
    """Layers of each chunk of this stage, whether it sees pictures, and whether it has the output layer."""
    arch = replace(tiny.architecture(), language=replace(tiny.LANGUAGE, num_layers=sum(layers)))
    model = tiny.build(INTERLEAVED, arch=arch, layers=layers)
    return [
        (
            [layer.layer_number for layer in chunk.language_model.decoder.layers],
            hasattr(chunk, "vision_model"),
            hasattr(chunk.language_model, "output_layer"),
        )
        for chunk in model.chunks
    ]


def test_chunks_are_dealt_in_turns() -> None:
    arch = compose(VISION["clip_vit_l_14_336"], LANGUAGE["mistral_7b_v03"], ProjectorArch(ffn_hidden_size=14336))
    layout = replace(INTERLEAVED, pipeline_model_parallel_size=4)
    layers = plan_layers(arch, layout)
    assert stage_layers(layers, 4) == plan_layers(arch, replace(layout, virtual_pipeline_model_parallel_size=1))
    assert layers == [3, 4, 4, 4, 4, 4, 5, 4]
    assert ranks.run(chunks, INTERLEAVED, 2, (2, 1, 1, 2)) == [
        [([1, 2], True, False), ([4], False, False)],
        [([3], False, False), ([5, 6], False, True)],
    ]


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"size 2 cuts the stages of a pipeline, and there is one"):
        ParallelConfig(virtual_pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match=r"first-pipeline-stage 1 is less than"):
        replace(INTERLEAVED, num_layers_in_first_pipeline_stage=1)
    with pytest.raises(ValueError, match=r"2 x --parallel.virtual-pipeline-model-parallel-size 3 is more than the 4"):
        check_layout(tiny.architecture(), replace(INTERLEAVED, virtual_pipeline_model_parallel_size=3))
    with pytest.raises(ValueError, match=r"leaves 1 of the 4 layers .* each needs 2"):
        check_layout(tiny.architecture(), replace(INTERLEAVED, num_layers_in_first_pipeline_stage=3))
    with pytest.raises(ValueError, match=r"6 rows is 3 micro batches .* must be a multiple of the 2 pipeline stages"):
        TrainConfig(global_batch_size=6).check_batch_sizes(2, INTERLEAVED.microbatch_multiple)
    TrainConfig(global_batch_size=8).check_batch_sizes(2, INTERLEAVED.microbatch_multiple)
    assert PP2.microbatch_multiple == 1
