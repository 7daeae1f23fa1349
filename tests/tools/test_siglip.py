"""siglip.py, against transformers' own classes."""

import json
from collections.abc import Callable
from pathlib import Path

import encoder
import pytest
import torch
from safetensors.torch import load_file, save_file
from siglip import SiglipConfig, convert
from torch import Tensor
from transformers import SiglipModel, SiglipVisionModel
from weight_files import Header, Weights
from weight_map import apply

from mmcore.constants import SIGLIP_IMAGE_MEAN, SIGLIP_IMAGE_STD
from mmcore.models.architecture import VisionArch, load_architecture
from mmcore.models.presets import VISION
from tests.tools import parity
from tests.tools.expected import assert_same, without_prefix
from tests.tools.expected import tower as expected_tower

State = dict[str, Tensor]
Build = Callable[..., torch.nn.Module]

# Two patches of 8 pixels in a row, and 4 pixels that no patch sees.
ARCH = VisionArch(
    model_subtype="siglip",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    image_size=20,
    patch_dim=8,
    activation="gelu_tanh",
    layernorm_epsilon=1e-6,
    image_mean=SIGLIP_IMAGE_MEAN,
    image_std=SIGLIP_IMAGE_STD,
)


def config(folder: Path, **options: object) -> SiglipConfig:
    return SiglipConfig(input=folder, output=folder.parent / "vision", **options)


@pytest.fixture
def folder(tmp_path: Path, tower: Build) -> Path:
    tower(SiglipVisionModel, image_size=20).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [(SiglipModel, {"contrastive head": 13, "text tower": 22}), (SiglipVisionModel, {"contrastive head": 11})],
)
def test_every_tensor(
    tmp_path: Path,
    tower: Build,
    read_checkpoint: Callable[[Path], State],
    kind: type,
    left_out: dict[str, int],
) -> None:
    model = tower(kind, image_size=20)
    model.save_pretrained(tmp_path / "hf")
    report = convert(config(tmp_path / "hf"))
    state = without_prefix(model.state_dict(), "" if kind is SiglipVisionModel else "vision_model.")
    found = read_checkpoint(tmp_path / "vision")
    assert_same(found, expected_tower(state, heads=8))
    assert found["vision_model.position_embeddings.weight"].shape == (4, 64)  # no class token
    assert load_architecture(tmp_path / "vision").vision == ARCH
    for reason, count in left_out.items():
        assert any(f"left out {count}: {reason}" in line for line in report)


def test_older_names_and_another_layer(folder: Path, read_checkpoint: Callable[[Path], State]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file({f"vision_model.{name}": tensor for name, tensor in state.items()}, path)
    convert(config(folder, feature_layer=-1))
    assert_same(read_checkpoint(folder.parent / "vision"), expected_tower(state, heads=8))
    vision = load_architecture(folder.parent / "vision").vision
    assert vision is not None and vision.feature_layer == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip2"}, "'siglip2', a NaFlex model .*take one of a fixed resolution"),
        ({"model_type": "siglip2_vision_model"}, "'siglip2_vision_model', a NaFlex model"),
        ({"model_type": "clip_vision_model"}, "this converter takes 'siglip' and 'siglip_vision_model'"),
        ({"quantization_config": {"bits": 8}}, "quantised weights"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; known are"),
        ({"image_size": 7}, "image_size 7 is not a multiple of patch_dim 8"),
        ({"num_hidden_layers": 5}, r"missing: encoder.layers.4.layer_norm1.bias \[64\]"),
        ({"image_size": 32}, r"position_embedding.weight is \[4, 64\], the architecture has \[16, 64\]"),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, changes: dict[str, object], message: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert(config(folder))
    assert not (folder.parent / "vision").exists()


def test_all_differing_tensors_are_named(folder: Path) -> None:
    """A tower of CLIP's: no bias on the patches, a class token and a norm before the layers."""
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["embeddings.patch_embedding.bias"]
    state |= {"embeddings.class_embedding": torch.ones(64), "pre_layrnorm.weight": torch.ones(64)}
    save_file(state, path)
    with pytest.raises(ValueError, match="3 differences") as raised:
        convert(config(folder))
    for told in (
        "missing: embeddings.patch_embedding.bias [64]",
        "unknown: embeddings.class_embedding [64]",
        "unknown: pre_layrnorm.weight [64]",
    ):
        assert told in str(raised.value)


# vision_config of google/siglip-* and google/siglip2-* config.json, as far as it is not SiglipVisionConfig's default.
PUBLISHED = {
    "siglip_base_patch16_224": {},
    "siglip_so400m_patch14_384": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(tmp_path: Path, name: str) -> None:
    tower = {"model_type": "siglip_vision_model", **PUBLISHED[name]}
    whole = {"model_type": "siglip", "vision_config": tower}
    arch = encoder.read_architecture(whole, tmp_path / "config.json", encoder.SIGLIP, -2)
    assert arch == VISION[name]
    with torch.device("meta"):
        model = SiglipVisionModel(SiglipVisionModel.config_class(**tower))
    headers = {key: Header(tuple(t.shape), t.dtype) for key, t in model.state_dict().items()}
    source = Weights(name="meta", files=(), headers=headers, read=lambda name: torch.empty(0))
    stored, dropped = apply(encoder.weight_map(arch), arch.num_layers, source)
    assert dropped == {"contrastive head: features are taken before it": 11}
    # 27 x 27 patches of 14 pixels leave 6 pixels of 384 unseen.
    rows = {"siglip_base_patch16_224": 196, "siglip_so400m_patch14_384": 729}[name]
    assert stored["vision_model.position_embeddings.weight"].shape == (rows, arch.hidden_size)


@pytest.mark.parametrize("kind", [SiglipModel, SiglipVisionModel])
def test_parity(tmp_path: Path, tower: Build, kind: type) -> None:
    tower(kind, image_size=20).save_pretrained(tmp_path / "hf")
    convert(config(tmp_path / "hf"))
    parity.check(tmp_path / "vision", tmp_path / "hf")
