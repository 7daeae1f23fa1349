"""Operations of a step, against those that torch counts while a tiny model does it."""

from dataclasses import replace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmcore.config import ParallelConfig
from mmcore.models.architecture import Architecture, ProjectorArch
from mmcore.models.flops import Flops, Work, causal_pairs, step_flops
from mmcore.models.presets import LANGUAGE, VISION, compose
from mmcore.training.freezing import freeze, is_named
from mmcore.training.step import packed_seq_params
from tests import ranks, tiny

FREEZES = {
    "none": (),
    "pretrain": ("vision_model", "language_model"),
    "sft": ("vision_model",),
    "vision and projector": ("vision_.*",),
    "language": ("language_model",),
    "projector": ("vision_projection",),
    "MLPs of the language model": ("vision_.*", r"language_model\.(?!.*\.mlp\.).*"),
    "norms of the language model": ("vision_.*", r"language_model\.(?!.*layernorm).*"),
}
NO_PADDING = replace(tiny.LANGUAGE, vocab_size=256)
TIED = replace(NO_PADDING, share_embeddings_and_output_weights=True)
IMAGE_TOKEN_ID = tiny.architecture().image_token_id  # which the batches have
ARCHITECTURES = {
    "mlp": replace(compose(tiny.VISION, NO_PADDING, ProjectorArch(ffn_hidden_size=40)), image_token_id=IMAGE_TOKEN_ID),
    "affine, tied": replace(
        compose(tiny.VISION, TIED, ProjectorArch(projector_type="affine")), image_token_id=IMAGE_TOKEN_ID
    ),
}


def counted(arch: Architecture, frozen: tuple[str, ...], recompute: str = "none") -> tuple[int, Work]:
    """What torch counts in one forward and backward pass, and what there was to do.

    torch's unfused attention multiplies all pairs of a sample, masked or not.
    """
    model = tiny.build(ParallelConfig(), arch=arch, recompute=recompute)
    freeze(model, frozen)
    batch = tiny.batch(2, 3, 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = model(
            batch.tokens,
            batch.images,
            labels=batch.labels,
            positions=batch.loss_positions,
            packed_seq_params=packed_seq_params(batch),
        )
        losses.sum().backward()
    lengths = batch.cu_seqlens.diff().tolist()
    return counter.get_total_flops(), Work(
        num_images=len(batch.images),
        num_positions=sum(lengths),
        num_pairs=sum(length**2 for length in lengths),
        num_labels=len(batch.loss_positions),
    )


def predicted(arch: Architecture, work: Work, frozen: tuple[str, ...], recompute: str = "none") -> Flops:
    return step_flops(arch, work, lambda name: not any(is_named(name, pattern) for pattern in frozen), recompute)


def unneeded(arch: Architecture, work: Work, name: str) -> float:
    """mcore's local layers make the gradient of their input also where nothing below is trained."""
    vision, between, language = arch.vision, arch.vision_projection, arch.language
    assert vision is not None and between is not None and language is not None
    if name in ("pretrain", "sft"):
        features = work.num_images * vision.num_image_embeddings
        return 2 * features * vision.hidden_size * (between.ffn_hidden_size or language.hidden_size)
    if name == "MLPs of the language model":
        return 2 * work.num_positions * language.hidden_size * 2 * language.ffn_hidden_size
    return 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", FREEZES)
def test_equal_to_what_torch_counts(kind: str, name: str) -> None:
    arch, frozen = ARCHITECTURES[kind], FREEZES[name]
    found, work = ranks.run(counted, ParallelConfig(), 1, arch, frozen)[0]
    assert found == predicted(arch, work, frozen).model + unneeded(arch, work, name)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["none", "pretrain", "sft"])
def test_recomputed_ones_are_the_hardwares(name: str, recompute: str) -> None:
    arch, frozen = ARCHITECTURES["mlp"], FREEZES[name]
    found, work = ranks.run(counted, ParallelConfig(), 1, arch, frozen, recompute)[0]
    count = predicted(arch, work, frozen, recompute)
    assert count.model == predicted(arch, work, frozen).model
    assert found == count.hardware + unneeded(arch, work, name)


def test_pairs_are_those_that_attend() -> None:
    """Half a square: the diagonal counts half, as everywhere."""
    assert causal_pairs(6) == 18 == causal_pairs(6, 6) == causal_pairs(6, 100)
    assert causal_pairs(6, 2) == 10  # a band of 2 on 6, without the half square that sticks out
    seen = sum(min(position + 1, 1000) for position in range(5000))
    assert causal_pairs(5000, 1000) == pytest.approx(seen, rel=1e-3)


def test_packed_samples_attend_each_by_itself() -> None:
    arch = ARCHITECTURES["mlp"]
    work = {"num_images": 0, "num_positions": 200, "num_labels": 10}
    one = step_flops(arch, Work(num_pairs=causal_pairs(200), **work))
    two = step_flops(arch, Work(num_pairs=2 * causal_pairs(100), **work))
    assert one.parts["attention"] == 2 * two.parts["attention"]


@pytest.mark.parametrize(("frozen", "passes"), [(("vision_model", "language_model"), 2), (("vision_model",), 3)])
def test_mistral_and_clip_by_hand(frozen: tuple[str, ...], passes: int) -> None:
    """A sample of 640 positions, one of them a label: 24 layers of which 23 are run, 32 of 0.218 billion weights."""
    arch = compose(
        replace(VISION["clip_vit_l_14_336"], feature_layer=-2),
        LANGUAGE["mistral_7b_v03"],
        ProjectorArch(ffn_hidden_size=14336, add_bias_linear=False),
    )
    work = Work(num_images=1, num_positions=640, num_pairs=causal_pairs(640), num_labels=1)
    parts = predicted(arch, work, frozen).parts
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    unread = 639 * 3 * 4096 * 14336  # the MLP of the last layer sees the label alone
    assert parts["language_model"] == passes * 2 * (640 * 32 * layer - unread)
    assert parts["attention"] == 3 * 32 * 2 * 640**2 * 4096
    assert parts["output_layer"] == passes * 2 * 32768 * 4096
    assert parts["vision_projection"] == 2 * 2 * 576 * (1024 * 14336 + 14336 * 4096) + 2 * 576 * 14336 * 4096
    image = 23 * (577 * 2 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024) + 2 * 576 * 3 * 14**2 * 1024
    assert parts["vision_model"] == image
