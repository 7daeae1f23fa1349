"""Tiles among the text, and batches without pictures, which no layout may hang or fall over."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from mmcore.config import ParallelConfig
from mmcore.data.batch import Batch, EncodedSample, collate
from mmcore.data.tiling import anyres_layout
from mmcore.models.architecture import PictureArch
from mmcore.models.splice import arrange
from mmcore.training import freezing
from mmcore.training.loss import step_shares, step_sums
from mmcore.training.step import forward_step
from tests import ranks, tiny

PINPOINTS = ((16, 32), (32, 16), (32, 32))
PICTURES = PictureArch(mode="squash", tiling="anyres", grid_pinpoints=PINPOINTS)
ANYRES = replace(tiny.architecture(), pictures=PICTURES)
LAYOUTS = {
    "tp2": (ParallelConfig(tensor_model_parallel_size=2), 2),
    "pp2": (ParallelConfig(pipeline_model_parallel_size=2), 2),
    "dp2": (ParallelConfig(), 2),
}
SIZES = [(30, 17), (), (9, 40), (16, 16)]  # of the pictures of four samples; the second has none


def test_features_are_arranged() -> None:
    features, newline = torch.arange(12.0).view(2, 3, 2), torch.tensor([50.0, 51.0])
    arranged = arrange(features, newline, torch.tensor([5, 0, -1, 1, -1]))
    assert arranged.tolist() == [[10, 11], [0, 1], [50, 51], [2, 3], [50, 51]]


def anyres_sample(seed: int, size: tuple[int, ...]) -> EncodedSample:
    """Text behind one picture cut into tiles, or behind none."""
    text = tiny.sample(seed, images=0)
    layout = anyres_layout((size[0], size[1]), 16, 2, PINPOINTS) if size else None
    sources = layout.sources if layout else ()
    num_squares = layout.num_squares if layout else 0
    random = torch.Generator().manual_seed(seed)
    picture = torch.full((len(sources),), tiny.LANGUAGE.vocab_size)
    nothing = torch.zeros(len(sources))
    return EncodedSample(
        key=f"s{seed}",
        tokens=torch.cat([text.tokens[:1], picture, text.tokens[1:]]),
        labels=torch.cat([nothing.long(), text.labels]),
        loss_mask=torch.cat([nothing, text.loss_mask]),
        images=torch.randint(0, 256, (num_squares, 3, 16, 16), generator=random, dtype=torch.uint8),
        image_sources=torch.tensor(sources, dtype=torch.int64),
        num_features=num_squares * tiny.VISION.num_image_embeddings,
    )


def packed_and_alone() -> None:
    model = tiny.build(ParallelConfig(), arch=ANYRES)
    samples = [anyres_sample(seed, size) for seed, size in enumerate(SIZES)]
    assert len({len(sample.images) for sample in samples}) == 3

    def losses(batch: Batch) -> torch.Tensor:
        output, _ = forward_step(iter([batch]), model)
        return output.detach()

    alone = torch.cat([losses(collate([sample])) for sample in samples])
    torch.testing.assert_close(losses(collate(samples)), alone, rtol=1e-5, atol=1e-5)
    wrong = collate(samples)
    assert wrong.image_sources is not None
    wrong.image_sources = wrong.image_sources[1:]
    with pytest.raises(ValueError, match=r"32 image placeholders but 31 image embeddings"):
        losses(wrong)
    wrong.image_sources = None
    with pytest.raises(ValueError, match=r"32 image placeholders but 44 image embeddings"):
        losses(wrong)


def test_tiles_of_a_row_of_samples() -> None:
    """Sources of packed samples count on; other counts than the sequence has places are refused."""
    ranks.run(packed_and_alone, ParallelConfig(), 1)


TEXT, MIXED, NOTHING = "text and pictures", "anyres", "no pictures"


def batches(kind: str) -> list[Batch]:
    """Two micro batches; of the first two kinds the first has no picture."""
    if kind == MIXED:
        samples = [anyres_sample(seed, SIZES[seed]) for seed in range(4)]
        return [collate([samples[1]]), collate([samples[0], samples[2]])]
    return [tiny.batch(0, 2, images=0), tiny.batch(2, 2, images=int(kind == TEXT))]


def step(parallel: ParallelConfig, kind: str, freeze: tuple[str, ...], overlap: bool) -> dict[str, Any]:
    """Loss, and of the vision tower and the projector what each parameter got, summed over replicas."""
    model = tiny.build(parallel, arch=ANYRES if kind == MIXED else None)
    freezing.freeze(model, freeze)
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=2000), model
    )
    model.config.no_sync_func = ddp.no_sync
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    # mcore learns in the first step which gradients come, and waits for them from the second on.
    for dealt in (batches(kind)[::-1], batches(kind)):
        ddp.zero_grad_buffer()
        own = dealt[rank::size]
        sums = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(own),
            model=[ddp],
            num_microbatches=len(own),
            seq_length=1,
            micro_batch_size=1,
        )
    total, _ = step_shares(step_sums(sums, 1).tolist())
    parts = [(name, getattr(parameter, "main_grad", None)) for name, parameter in model.named_parameters()]
    vision = {name: grad.norm().item() for name, grad in parts if grad is not None and name.startswith("vision")}
    return {"loss": total.loss, "vision": vision}


FREEZES: dict[str, tuple[str, ...]] = {"nothing": (), "pretrain": ("vision_model", "language_model")}


@pytest.mark.parametrize("kind", [TEXT, MIXED, NOTHING])
@pytest.mark.parametrize("freeze", FREEZES)
def test_batches_without_pictures(kind: str, freeze: str) -> None:
    """Every layout, gradients reduced while the backward pass runs: mcore refuses a parameter without one."""
    (expected,) = ranks.run(step, ParallelConfig(), 1, ParallelConfig(), kind, FREEZES[freeze], False)
    largest = max(expected["vision"].values())
    assert largest == 0 if kind == NOTHING else largest > 0
    assert kind != MIXED or expected["vision"]["vision_projection.image_newline"] > 0
    for name, (layout, world_size) in LAYOUTS.items():
        for result in ranks.run(step, layout, world_size, layout, kind, FREEZES[freeze], True):
            assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6), name
            if result["vision"] and name != "tp2":  # where some are cut
                assert result["vision"] == pytest.approx(expected["vision"], rel=1e-4, abs=1e-9), name
