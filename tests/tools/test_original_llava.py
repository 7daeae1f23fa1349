"""llava.py on folders as LLaVA's own training leaves them, made of the weights of transformers' class."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import clip
import combine
import llama
import pytest
import torch
from llava import LlavaConfig, convert, plan
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmcore.models.architecture import load_architecture
from tests.tools import parity
from tests.tools.expected import assert_same, without_prefix

State = dict[str, Tensor]
Build = Callable[..., torch.nn.Module]

ROWS = 150
"""Of the embedding tables: the original has no rows for an image token."""


def config(folder: Path, **options: object) -> LlavaConfig:
    return LlavaConfig(input=folder, output=folder.parent / "model", **options)


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def write_original(folder: Path, model: torch.nn.Module, **changes: object) -> Path:
    """The original's folder of a model of transformers, and beside it that of its vision tower.

    Names and configuration are those of liuhaotian/llava-v1.5-7b.
    """
    text, state = model.config.text_config, model.state_dict()
    folder.mkdir()
    original = {f"model.{name}": tensor for name, tensor in without_prefix(state, "model.language_model.").items()}
    original["model.embed_tokens.weight"] = state["model.language_model.embed_tokens.weight"][:ROWS].clone()
    original["lm_head.weight"] = state["lm_head.weight"][:ROWS].clone()
    for layer, number in (("linear_1", 0), ("linear_2", 2)):
        for kind in ("weight", "bias"):
            tensor = state[f"model.multi_modal_projector.{layer}.{kind}"]
            original[f"model.mm_projector.{number}.{kind}"] = tensor
    torch.save(original, folder / "pytorch_model.bin")
    content = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad",
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "someone/clip-tiny",
        "model_type": "llava",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": 20000.0,
        "tie_word_embeddings": False,
        "vocab_size": ROWS,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(content))
    tower = (CLIPVisionModel if "clip" in model.config.vision_config.model_type else SiglipVisionModel)(
        model.config.vision_config
    )
    tower.load_state_dict(without_prefix(state, "model.vision_tower."), strict=True)
    tower.save_pretrained(folder.parent / "clip-tiny")
    return folder


@pytest.fixture
def model(llava: Build) -> torch.nn.Module:
    return llava(CLIPVisionConfig, LlamaConfig)


@pytest.fixture
def folder(tmp_path: Path, model: torch.nn.Module) -> Path:
    return write_original(tmp_path / "llava-tiny", model)


def test_equals_the_llava_hf_folder(
    tmp_path: Path, model: torch.nn.Module, folder: Path, read_checkpoint: Callable[[Path], State]
) -> None:
    """But for the vocabulary: the image token comes after it, and has no row."""
    model.save_pretrained(tmp_path / "hf")
    convert(config(tmp_path / "hf"))
    wanted, arch = read_checkpoint(tmp_path / "model"), load_architecture(tmp_path / "model")
    report = convert(config(folder, overwrite=True))
    for table in ("embedding.word_embeddings.weight", "output_layer.weight"):
        wanted[f"language_model.{table}"][ROWS:] = 0
    assert_same(read_checkpoint(tmp_path / "model"), wanted)
    found = load_architecture(tmp_path / "model")
    assert arch.language is not None
    language = replace(arch.language, vocab_size=ROWS)
    # Beside the weights of LLaVA's own there is what it did to pictures; beside these of the hub there is not.
    assert (arch.pictures.mode, found.pictures.mode) == ("crop", "pad")
    others = {"image_token_id": ROWS, "sources": found.sources, "pictures": found.pictures}
    assert found == replace(arch, language=language, **others)
    assert found.conversation == "vicuna_v1"
    assert [source["file"] for source in found.sources] == ["model.safetensors", "pytorch_model.bin"]
    assert any("image token 150, after the vocabulary; 16 for each image" in line for line in report)
    assert any(f"vision tower: {tmp_path / 'clip-tiny'}" in line for line in report)
    assert any("16 for each image, not square ones by pad" in line for line in report)


def test_the_tower_is_found_by_name_or_by_option(tmp_path: Path, folder: Path) -> None:
    place = tmp_path / "clip-tiny"
    assert plan(config(folder)).references == (folder, place)
    (tmp_path / "someone").mkdir()
    nested = place.rename(tmp_path / "someone" / "clip-tiny")
    assert plan(config(folder)).references == (folder, nested)
    elsewhere = nested.rename(tmp_path / "tower")
    assert plan(config(folder, vision_tower=elsewhere)).references == (folder, elsewhere)
    with pytest.raises(ValueError, match=r"names its vision tower, someone/clip-tiny.*--vision-tower"):
        plan(config(folder))
    with pytest.raises(ValueError, match=r"--vision-tower .*nowhere does not exist"):
        plan(config(folder, vision_tower=tmp_path / "nowhere"))
    edit(folder / "config.json", mm_vision_tower=str(elsewhere))
    assert plan(config(folder)).references == (folder, elsewhere)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_tower_that_was_tuned_with_the_model(
    folder: Path, read_checkpoint: Callable[[Path], State], prefix: str
) -> None:
    """As LLaVA-1.6 keeps it; the folder of the tower then only tells its sizes."""
    convert(config(folder))
    before = read_checkpoint(folder.parent / "model")
    tuned = {name: 2 * tensor for name, tensor in load_file(folder.parent / "clip-tiny" / "model.safetensors").items()}
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights |= {f"model.vision_tower.vision_tower.{prefix}{name}": tensor for name, tensor in tuned.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    report = convert(config(folder, overwrite=True))
    after = read_checkpoint(folder.parent / "model")
    assert_same(after, {key: (2 if key.startswith("vision_model.") else 1) * before[key] for key in before})
    assert any("vision tower: its own, built as" in line for line in report)
    sources = load_architecture(folder.parent / "model").sources
    assert [source["file"] for source in sources] == ["pytorch_model.bin"]


def test_a_projector_in_a_file_of_its_own(folder: Path, read_checkpoint: Callable[[Path], State]) -> None:
    convert(config(folder))
    wanted = read_checkpoint(folder.parent / "model")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    projector = {name: weights.pop(name) for name in list(weights) if "mm_projector" in name}
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="4 differences") as raised:
        convert(config(folder, overwrite=True))
    assert "missing: model.mm_projector.2.bias [64]" in str(raised.value)
    torch.save(projector, folder / "mm_projector.bin")
    convert(config(folder, overwrite=True))
    assert_same(read_checkpoint(folder.parent / "model"), wanted)
    sources = load_architecture(folder.parent / "model").sources
    assert [source["file"] for source in sources] == ["model.safetensors", "pytorch_model.bin", "mm_projector.bin"]


def test_a_linear_projector_and_the_class_token(folder: Path, read_checkpoint: Callable[[Path], State]) -> None:
    """LLaVA-1's, with what its configuration leaves to the defaults of the code."""
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights = {name: tensor for name, tensor in weights.items() if "mm_projector" not in name}
    linear = {"model.mm_projector.weight": torch.rand(64, 48), "model.mm_projector.bias": torch.rand(64)}
    torch.save(weights | linear, folder / "pytorch_model.bin")
    edit(
        folder / "config.json",
        mm_projector_type="gone",
        mm_hidden_size="gone",
        image_aspect_ratio="gone",
        mm_vision_select_feature="cls_patch",
        mm_vision_select_layer=4,
    )
    report = convert(config(folder, conversation="plain"))
    found, arch = read_checkpoint(folder.parent / "model"), load_architecture(folder.parent / "model")
    for kind in ("weight", "bias"):
        assert torch.equal(found[f"vision_projection.encoder.{kind}"], linear[f"model.mm_projector.{kind}"])
    assert arch.vision is not None and arch.vision_projection is not None and arch.conversation == "plain"
    assert (arch.vision.feature_layer, arch.vision.drop_class_token) == (-1, False)
    assert arch.vision_projection.projector_type == "affine"
    assert arch.pictures.mode == "crop" and any("not square ones by crop" in line for line in report)


def test_mistral_and_siglip(tmp_path: Path, llava: Build) -> None:
    model = llava(SiglipVisionConfig, MistralConfig, vision={"vision_use_head": False})
    folder = write_original(tmp_path / "llava-tiny", model, model_type="llava_mistral", sliding_window=None)
    found = plan(config(folder)).architecture
    assert found.vision is not None and found.language is not None
    assert (found.vision.model_subtype, found.language.model_type) == ("siglip", "mistral")
    assert found.conversation == "mistral_instruct"


def test_a_tower_of_openai(tmp_path: Path, llava: Build, clip: Build) -> None:
    """A file of weights: its heads follow from its width, its activation from whose it is."""
    model = llava(CLIPVisionConfig, LlamaConfig, vision={"hidden_size": 128})
    folder = write_original(tmp_path / "llava-tiny", model, mm_vision_tower="openai/clip-tiny")
    state = clip(width=128, layers=2, mlp_ratio=0.5).state_dict()
    torch.save(state, tmp_path / "clip.pt")
    conversion = plan(config(folder, vision_tower=tmp_path / "clip.pt"))
    vision = conversion.architecture.vision
    assert vision is not None and (vision.num_attention_heads, vision.activation) == (2, "quick_gelu")
    ours = conversion.tensors["vision_model.conv1.weight"].read(0)
    assert torch.equal(ours, state["visual.conv1.weight"])
    edit(folder / "config.json", mm_vision_tower="laion/clip-tiny")
    with pytest.raises(ValueError, match=r"is a file, .*give the Hugging Face folder of laion/clip-tiny"):
        plan(config(folder, vision_tower=tmp_path / "clip.pt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "model_type": "llava_mpt",
                "mm_projector_type": "mlp3x_gelu",
                "mm_vision_select_feature": "cls",
                "mm_use_im_start_end": True,
                "mm_resampler_type": "perceiver",
                "s2": True,
                "mm_vision_select_layer": "gone",
            },
            r"model_type is 'llava_mpt', .*; mm_projector_type is 'mlp3x_gelu', .*; mm_vision_select_feature is 'cls', "
            r".*; mm_use_im_start_end is True: it puts .*; "
            r"mm_resampler_type is 'perceiver': .*; s2 is True: .*; mm_vision_select_layer is None",
        ),
        ({"mm_vision_tower": None}, "mm_vision_tower is empty"),
        ({"mm_vision_select_layer": -5}, "feature_layer -5 must lie between -4 and -1"),
        ({"mm_hidden_size": 1024}, r"is not someone/clip-tiny.*it has hidden_size 48 instead of 1024"),
        (
            {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024},
            "names its vision tower, openai/clip-vit-large-patch14-336",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "quantised weights"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' with mm_patch_merge_type 'flat'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "image_aspect_ratio 'pad' with mm_patch_merge_type 'spatial_unpad'"),
        (
            {
                "image_aspect_ratio": "anyres",
                "mm_patch_merge_type": "spatial_unpad",
                "image_grid_pinpoints": "(1x1),...,(6x6)",
            },
            r"image_grid_pinpoints '\(1x1\)",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"num_hidden_layers": 3}, r"unknown: model.layers.3.input_layernorm.weight \[64\]"),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, changes: dict[str, object], message: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert(config(folder))
    assert not (folder.parent / "model").exists()


def test_another_tower_than_the_one_that_is_named(folder: Path) -> None:
    edit(folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size="gone")
    told = "hidden_size 48 instead of 1024, num_layers 4 instead of 24, image_size 32 instead of 336, patch_dim 8"
    with pytest.raises(ValueError, match=told):
        convert(config(folder, vision_tower=folder.parent / "clip-tiny"))


def test_the_differences_of_all_parts_are_told_at_once(folder: Path) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del weights["model.norm.weight"]
    weights["model.mm_projector.2.weight"] = torch.ones(64, 63)
    weights |= {
        "model.image_newline": torch.ones(64),
        "model.vision_tower.vision_tower.post_layernorm.bias": torch.ones(48),
    }
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="differences") as raised:
        convert(config(folder))
    for told in (
        "missing: model.norm.weight [64]",
        "wrong shape: model.mm_projector.2.weight is [64, 63], the architecture has [64, 64]",
        "unknown: model.image_newline [64]",
        "missing: model.vision_tower.vision_tower.post_layernorm.weight [48]",
    ):
        assert told in str(raised.value)


def test_equals_its_parts_joined(tmp_path: Path, folder: Path, read_checkpoint: Callable[[Path], State]) -> None:
    """The language model, the tower and mm_projector.bin, converted one by one."""
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    between = {name: weights.pop(name) for name in list(weights) if "mm_projector" in name}
    torch.save(between, tmp_path / "mm_projector.bin")
    (tmp_path / "vicuna").mkdir()
    torch.save(weights, tmp_path / "vicuna" / "pytorch_model.bin")
    content = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "vicuna" / "config.json").write_text(json.dumps(content))
    clip.convert(clip.ClipConfig(input=tmp_path / "clip-tiny", output=tmp_path / "vision"))
    llama.convert(llama.LlamaConfig(input=tmp_path / "vicuna", output=tmp_path / "language", conversation="vicuna_v1"))
    combine.convert(
        combine.CombineConfig(
            vision=tmp_path / "vision",
            language=tmp_path / "language",
            projector_weights=tmp_path / "mm_projector.bin",
            image_mode="pad",
            output=tmp_path / "joined",
        )
    )
    convert(config(folder))
    assert_same(read_checkpoint(tmp_path / "joined"), read_checkpoint(tmp_path / "model"))
    joined, whole = load_architecture(tmp_path / "joined"), load_architecture(tmp_path / "model")
    assert replace(joined, sources=()) == replace(whole, sources=())


def test_less_than_a_model(tmp_path: Path, folder: Path) -> None:
    """What LLaVA's pretraining and its LoRA tuning leave."""
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: weights[name] for name in weights if "mm_projector" in name}, folder / "mm_projector.bin")
    (folder / "pytorch_model.bin").unlink()
    for path in (folder, folder / "mm_projector.bin"):
        with pytest.raises(ValueError, match=r"combine.py --projector-weights"):
            convert(replace(config(folder), input=path))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter \(LoRA\).*merge it into its base model"):
        convert(config(folder))
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        convert(config(tmp_path / "none"))


@pytest.mark.parametrize(
    ("language", "changes"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1}),
        (MistralConfig, {"model_type": "llava_mistral", "sliding_window": 12}),
    ],
)
def test_parity(tmp_path: Path, llava: Build, language: type, changes: dict[str, object]) -> None:
    folder = write_original(tmp_path / "llava-tiny", llava(CLIPVisionConfig, language), **changes)
    convert(config(folder))
    parity.check(tmp_path / "model", folder, tmp_path / "clip-tiny")


def test_parity_of_a_tuned_tower(folder: Path) -> None:
    tower = load_file(folder.parent / "clip-tiny" / "model.safetensors")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights |= {f"model.vision_tower.vision_tower.vision_model.{name}": tower[name] for name in tower}
    torch.save(weights, folder / "pytorch_model.bin")
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in tower.items()},
        folder.parent / "clip-tiny" / "model.safetensors",
    )
    convert(config(folder))
    parity.check(folder.parent / "model", folder, folder.parent / "clip-tiny")
