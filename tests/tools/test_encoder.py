"""encoder.py: CLIP's towers as transformers' own classes save them, and the published sizes of both libraries."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import clip as converter
import encoder
import open_clip
import pytest
import torch
from clip import ClipConfig, convert
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModel
from weight_files import Header, Weights
from weight_map import apply

from mmcore.models.architecture import VisionArch, load_architecture
from mmcore.models.presets import VISION
from tests.tools import parity
from tests.tools.expected import assert_same, without_prefix
from tests.tools.expected import tower as expected_tower

State = dict[str, Tensor]


def from_folder(folder: Path, **options: object) -> ClipConfig:
    return ClipConfig(input=folder, output=folder.parent / "vision", **options)


TOWER = VisionArch(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, image_size=32, patch_dim=8)


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def test_hugging_face_model(
    tmp_path: Path, tower: Callable[..., torch.nn.Module], read_checkpoint: Callable[[Path], State]
) -> None:
    model = tower(CLIPModel)
    model.save_pretrained(tmp_path / "hf")
    report = convert(from_folder(tmp_path / "hf"))
    state = without_prefix(model.state_dict(), "vision_model.")
    assert_same(read_checkpoint(tmp_path / "vision"), expected_tower(state, heads=8))
    assert load_architecture(tmp_path / "vision").vision == TOWER
    text = sum(name.startswith("text_") for name in model.state_dict())
    assert any(f"left out {text}: text tower" in line for line in report)
    assert any("left out 2: contrastive head" in line for line in report)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_hugging_face_tower(
    tmp_path: Path, tower: Callable[..., torch.nn.Module], read_checkpoint: Callable[[Path], State], prefix: str
) -> None:
    """transformers 5 writes no prefix; older versions one, and a buffer of positions."""
    model = tower(CLIPVisionModel, hidden_act="gelu", layer_norm_eps=1e-6).half()
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    assert "encoder.layers.0.layer_norm1.bias" in state
    old = {prefix + name: tensor for name, tensor in state.items()}
    save_file(old | ({f"{prefix}embeddings.position_ids": torch.arange(17)[None]} if prefix else {}), path)
    report = convert(from_folder(tmp_path / "hf"))
    assert_same(read_checkpoint(tmp_path / "vision"), expected_tower(state, heads=8))
    assert load_architecture(tmp_path / "vision").vision == replace(TOWER, activation="gelu", layernorm_epsilon=1e-6)
    assert any("left out 1: counts from 0" in line for line in report) == bool(prefix)


def test_both_libraries_names_make_the_same_checkpoint(
    tmp_path: Path, clip: Callable[..., torch.nn.Module], read_checkpoint: Callable[[Path], State]
) -> None:
    """open_clip's tower, its weights put into transformers' class by hand."""
    source = clip(layers=4, head_width=8)
    torch.save(source.state_dict(), tmp_path / "clip.pt")
    visual = source.visual.state_dict()
    state = {
        "embeddings.class_embedding": visual["class_embedding"],
        "embeddings.position_embedding.weight": visual["positional_embedding"],
        "embeddings.patch_embedding.weight": visual["conv1.weight"],
    }
    for kind in ("weight", "bias"):
        state |= {f"pre_layrnorm.{kind}": visual[f"ln_pre.{kind}"], f"post_layernorm.{kind}": visual[f"ln_post.{kind}"]}
        for layer in range(4):
            there, here = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            query, key, value = visual[f"{here}attn.in_proj_{kind}"].chunk(3)
            state |= {
                f"{there}self_attn.q_proj.{kind}": query.clone(),
                f"{there}self_attn.k_proj.{kind}": key.clone(),
                f"{there}self_attn.v_proj.{kind}": value.clone(),
                f"{there}self_attn.out_proj.{kind}": visual[f"{here}attn.out_proj.{kind}"],
                f"{there}layer_norm1.{kind}": visual[f"{here}ln_1.{kind}"],
                f"{there}layer_norm2.{kind}": visual[f"{here}ln_2.{kind}"],
                f"{there}mlp.fc1.{kind}": visual[f"{here}mlp.c_fc.{kind}"],
                f"{there}mlp.fc2.{kind}": visual[f"{here}mlp.c_proj.{kind}"],
            }
    model = CLIPVisionModel(
        CLIPVisionModel.config_class(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=8,
            image_size=32,
            patch_size=8,
        )
    )
    model.load_state_dict(state, strict=True)
    model.save_pretrained(tmp_path / "hf")
    convert(from_folder(tmp_path / "clip.pt", head_width=8, activation="quick_gelu"))
    first = read_checkpoint(tmp_path / "vision"), load_architecture(tmp_path / "vision").vision
    convert(replace(from_folder(tmp_path / "hf"), overwrite=True))
    assert_same(read_checkpoint(tmp_path / "vision"), first[0])
    assert load_architecture(tmp_path / "vision").vision == first[1] == TOWER


@pytest.fixture
def hf_folder(tmp_path: Path, tower: Callable[..., torch.nn.Module]) -> Path:
    tower(CLIPVisionModel).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model_type": "siglip_vision_model"}, {}, "model_type is 'siglip_vision_model'; this converter takes 'clip'"),
        ({"hidden_act": "relu"}, {}, "hidden_act is 'relu'; known are quick_gelu"),
        ({"num_channels": 1}, {}, "only colour pictures"),
        ({"num_attention_heads": 7}, {}, "not a multiple of num_attention_heads 7"),
        ({"image_size": [32, 32]}, {}, "'image_size' must be a number above 0"),
        ({"image_size": 36}, {}, "image_size 36 is not a multiple of patch_dim 8"),
        ({"quantization_config": {"bits": 4}}, {}, "quantised weights cannot be converted"),
        (
            {},
            {"num_attention_heads": 4, "head_width": 16, "activation": "gelu"},
            "--num-attention-heads 4 but it says 8, --head-width 16 but it says 8, --activation gelu but it says quick",
        ),
    ],
)
def test_configurations_that_do_not_fit(
    hf_folder: Path, changes: dict[str, object], options: dict[str, object], message: str
) -> None:
    edit(hf_folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert(from_folder(hf_folder, **options))


def test_all_differing_tensors_are_named(hf_folder: Path) -> None:
    path = hf_folder / "model.safetensors"
    state = load_file(path)
    state |= {"encoder.layers.4.layer_norm1.bias": torch.ones(64), "pre_layrnorm.bias": torch.ones(63)}
    state["post_layernorm.weight"] = torch.ones(64, dtype=torch.int8)
    del state["embeddings.class_embedding"]
    save_file(state, path)
    with pytest.raises(ValueError, match="4 differences") as raised:
        convert(from_folder(hf_folder))
    for told in (
        "unknown: encoder.layers.4.layer_norm1.bias [64]",
        "missing: embeddings.class_embedding [64]",
        "wrong shape: pre_layrnorm.bias is [63], the architecture has [64]",
        "wrong dtype: post_layernorm.weight is torch.int8",
    ):
        assert told in str(raised.value)


def test_ranges_are_not_lost(hf_folder: Path, read_checkpoint: Callable[[Path], State]) -> None:
    count = len(load_file(hf_folder / "model.safetensors"))
    with pytest.raises(ValueError, match=f"{count} differences") as raised:
        convert(from_folder(hf_folder, dtype="float16"))
    assert str(raised.value).count("range lost: ") == count
    convert(from_folder(hf_folder, dtype="bfloat16"))
    assert {tensor.dtype for tensor in read_checkpoint(hf_folder.parent / "vision").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_pixel_statistics(hf_folder: Path, name: str) -> None:
    content = {"image_mean": [0, 0, 0], "image_std": [1, 1, 0.5]}
    nested = {"image_processor": content, "processor_class": "CLIPProcessor"}
    (hf_folder / name).write_text(json.dumps(content if name.startswith("pre") else nested))
    convert(from_folder(hf_folder))
    vision = load_architecture(hf_folder.parent / "vision").vision
    assert vision is not None and (vision.image_mean, vision.image_std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 0.5))
    (hf_folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5], "image_std": [1, 1, 1]}')
    with pytest.raises(ValueError, match=r"preprocessor_config.json: mean \[0.5, 0.5\].*three numbers"):
        convert(from_folder(hf_folder, overwrite=True))


# config.json of openai/clip-vit-*: what it says of the tower, as far as that is not the default of CLIPVisionConfig.
OPENAI = {
    "clip_vit_b_16": {"patch_size": 16},
    "clip_vit_l_14": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}
OPENAI["clip_vit_l_14_336"] = {**OPENAI["clip_vit_l_14"], "image_size": 336}
LAION = {
    "clip_vit_h_14": {
        **OPENAI["clip_vit_l_14"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "hidden_act": "gelu",
    }
}


@pytest.mark.parametrize(("name", "tower"), [*OPENAI.items(), *LAION.items()])
def test_published_configurations(tmp_path: Path, name: str, tower: dict[str, object]) -> None:
    path = tmp_path / "config.json"
    whole = {"model_type": "clip", "vision_config": tower, "vision_config_dict": None}
    assert encoder.read_architecture(whole, path, encoder.CLIP, -2) == VISION[name]
    # Some carry it twice; transformers then takes the second.
    twice = {"model_type": "clip", "vision_config": {**tower, "patch_size": 32}, "vision_config_dict": tower}
    assert encoder.read_architecture(twice, path, encoder.CLIP, -2) == VISION[name]


def headers(module: torch.nn.Module, prefix: str) -> Weights:
    """A model's tensors without their values."""
    found = {prefix + name: Header(tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}
    return Weights(name="meta", files=(), headers=found, read=lambda name: torch.empty(0))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("clip_vit_b_16", "ViT-B-16-quickgelu"),
        ("clip_vit_l_14", "ViT-L-14-quickgelu"),
        ("clip_vit_l_14_336", "ViT-L-14-336-quickgelu"),
        ("clip_vit_h_14", "ViT-H-14"),
    ],
)
def test_published_shapes(name: str, model: str) -> None:
    """The real models of both libraries, on the meta device."""
    content = open_clip.get_model_config(model)
    with torch.device("meta"):
        visual = open_clip.model._build_vision_tower(content["embed_dim"], content["vision_cfg"], True)
        arch = VISION[name]
        sizes = {"hidden_size": arch.hidden_size, "intermediate_size": arch.ffn_hidden_size}
        sizes |= {"num_hidden_layers": arch.num_layers, "num_attention_heads": arch.num_attention_heads}
        theirs = CLIPVisionModel(
            CLIPVisionModel.config_class(**sizes, image_size=arch.image_size, patch_size=arch.patch_dim)
        )
    assert (content.get("quick_gelu", False), content["vision_cfg"].get("head_width", 64)) == (
        arch.activation == "quick_gelu",
        arch.hidden_size // arch.num_attention_heads,
    )
    source = headers(visual, "visual.")
    options = from_folder(Path("x"), activation=arch.activation)
    assert converter.read_architecture(source, options) == arch
    from_open_clip, dropped = apply(converter.weight_map(arch), arch.num_layers, source)
    assert dropped == {"contrastive head: features are taken before it": 1}
    from_transformers, _ = apply(encoder.weight_map(arch), arch.num_layers, headers(theirs, ""))
    shapes = {key: tensor.global_shape for key, tensor in from_open_clip.items()}
    assert shapes == {key: tensor.global_shape for key, tensor in from_transformers.items()}


@pytest.mark.parametrize("kind", [CLIPModel, CLIPVisionModel])
def test_parity_of_hugging_face_folders(tmp_path: Path, tower: Callable[..., torch.nn.Module], kind: type) -> None:
    tower(kind).save_pretrained(tmp_path / "hf")
    convert(from_folder(tmp_path / "hf"))
    parity.check(tmp_path / "vision", tmp_path / "hf")
