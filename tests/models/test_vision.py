"""The vision tower: what it sees, which layers it runs, what it never trains."""

from dataclasses import replace

import pytest
import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel

from mmcore.config import ParallelConfig
from mmcore.constants import SIGLIP_IMAGE_MEAN, SIGLIP_IMAGE_STD
from mmcore.models.architecture import VisionArch
from mmcore.models.llava import base_config
from mmcore.models.vision import VisionModel, vision_config
from tests import ranks

CLIP = VisionArch(num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, image_size=24, patch_dim=8)
# Two patches of 8 pixels in a row, and 4 pixels that fill none.
SIGLIP = replace(
    CLIP,
    model_subtype="siglip",
    image_size=20,
    activation="gelu_tanh",
    layernorm_epsilon=1e-6,
    image_mean=SIGLIP_IMAGE_MEAN,
    image_std=SIGLIP_IMAGE_STD,
)


def build(arch: VisionArch) -> VisionModel:
    """Every weight random, norms and biases too."""
    model = VisionModel(arch, vision_config(arch, **base_config(ParallelConfig())), "local")
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(float(parameter.ndim == 1), 0.2, generator=random)
    return model


def pixels(arch: VisionArch, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, arch.image_size, arch.image_size, generator=torch.Generator().manual_seed(1))


def parts() -> None:
    clip, siglip = build(CLIP), build(SIGLIP)
    assert clip.conv1.bias is None and clip.ln_pre is not None and clip.class_token.shape == (1, 1, 32)
    assert siglip.conv1.bias is not None and siglip.ln_pre is None and not hasattr(siglip, "class_token")
    for model, arch, positions in ((clip, CLIP, 9 + 1), (siglip, SIGLIP, 4)):
        assert arch.num_positions == positions
        assert model.position_embeddings.weight.shape == (positions, 32)
        assert model(pixels(arch)).shape == (2, arch.num_image_embeddings, 32)


def test_parts_of_both_kinds() -> None:
    ranks.run(parts, ParallelConfig(), 1)


@torch.no_grad()
def unseen_pixels() -> None:
    model, images = build(SIGLIP), pixels(SIGLIP)
    features = model(images)
    edges = images.clone()
    edges[..., 16:, :] += 1
    edges[..., :, 16:] += 1
    assert torch.equal(model(edges), features)
    edges[..., 15, 15] += 1  # of the last patch
    changed = (model(edges) - features).abs().amax(dim=(0, 2))
    assert (changed > 0).all()  # every patch attends to it


def test_pixels_that_fill_no_patch_are_not_seen() -> None:
    ranks.run(unseen_pixels, ParallelConfig(), 1)


@torch.no_grad()
def class_token() -> None:
    images = pixels(CLIP)
    kept = build(replace(CLIP, drop_class_token=False))(images)
    dropped = build(CLIP)(images)
    assert kept.shape == (2, 10, 32) and torch.equal(kept[:, 1:], dropped)


def test_the_class_token_is_the_first_feature() -> None:
    assert (CLIP.num_image_embeddings, replace(CLIP, drop_class_token=False).num_image_embeddings) == (9, 10)
    assert SIGLIP.num_image_embeddings == replace(SIGLIP, drop_class_token=False).num_image_embeddings == 4
    ranks.run(class_token, ParallelConfig(), 1)


@torch.no_grad()
def against_megatron_core(arch: VisionArch) -> None:
    """Its own forward runs all layers and the norm after them."""
    model, images = build(replace(arch, feature_layer=-1, drop_class_token=False)), pixels(arch)
    theirs = CLIPViTModel.forward(model, images)
    torch.testing.assert_close(model.ln_post(model(images)), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("arch", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_equals_megatron_core_up_to_the_last_norm(arch: VisionArch) -> None:
    ranks.run(against_megatron_core, ParallelConfig(), 1, arch)


def layers_above(arch: VisionArch) -> None:
    model, images = build(arch), pixels(arch)
    model(images).square().mean().backward()
    idle = {f"decoder.layers.{layer}." for layer in range(arch.num_layers_run, arch.num_layers)} | {"ln_post."}
    for name, parameter in model.named_parameters():
        is_idle = any(name.startswith(prefix) for prefix in idle)
        assert parameter.requires_grad != is_idle, name
        assert (parameter.grad is None) == is_idle, name
    features = model(images).detach()
    for name, parameter in model.named_parameters():
        if any(name.startswith(prefix) for prefix in idle):
            parameter.data.fill_(torch.nan)
    assert torch.equal(model(images).detach(), features)
    model.decoder.layers[arch.num_layers_run - 1].mlp.linear_fc2.bias.data.fill_(torch.nan)
    assert model(images).isnan().all()


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("arch", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_what_lies_above_the_features_is_neither_run_nor_trained(arch: VisionArch, layer: int) -> None:
    """Layers above, and the norm after the last one, which are only kept."""
    assert replace(arch, feature_layer=layer).num_layers_run == 4 + layer
    ranks.run(layers_above, ParallelConfig(), 1, replace(arch, feature_layer=layer))


def frozen() -> None:
    model, images = build(SIGLIP), pixels(SIGLIP)
    assert model(images).requires_grad
    model.requires_grad_(False)
    assert not model(images.requires_grad_()).requires_grad


def test_frozen_it_needs_no_graph() -> None:
    ranks.run(frozen, ParallelConfig(), 1)


@torch.no_grad()
def normalized(arch: VisionArch) -> None:
    model = build(arch)
    shape = (2, 3, arch.image_size, arch.image_size)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    by_hand = torch.stack(
        [(images[:, c] / 255 - arch.image_mean[c]) / arch.image_std[c] for c in range(3)], dim=1
    )  # [n, 3, h, w]
    torch.testing.assert_close(model(images), model(by_hand), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_bytes_are_scaled_by_the_towers_own_statistics(arch: VisionArch) -> None:
    ranks.run(normalized, ParallelConfig(), 1, replace(arch, image_std=(0.2, 0.3, 0.4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 20}, "image_size 20 is not a multiple of patch_dim 8"),
        ({"image_size": 7, "model_subtype": "siglip"}, "image_size 7 is not a multiple of patch_dim 8"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"feature_layer": -4}, "feature_layer -4 must lie between -3 and -1"),
        ({"feature_layer": 0}, "feature_layer 0 must lie between -3 and -1"),
    ],
)
def test_architectures_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CLIP, **changes)
