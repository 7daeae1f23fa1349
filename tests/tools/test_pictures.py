"""Modes and tiles on their way in and out: what a folder says of pictures is what is done to them, pixel for pixel."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import clip
import llava
import mistral
import pytest
import siglip
import torch
from combine import CombineConfig, convert
from export_hf import ExportConfig
from export_hf import convert as export
from picture_processors import image_processor, read_pictures
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmcore.config import ParallelConfig
from mmcore.data.image import decode_image
from mmcore.data.pictures import Pictures
from mmcore.models.architecture import (
    Architecture,
    PictureArch,
    VisionArch,
    load_architecture,
    save_architecture,
    with_image_mode,
)
from mmcore.models.presets import default_pictures
from tests import ranks
from tests.data.fabricated import picture, write_tokenizer
from tests.tools import parity
from tests.tools.conftest import build_llava, build_mistral, build_tower
from tests.tools.expected import assert_same
from tests.tools.test_combine import loaded
from tests.tools.test_original_llava import write_original

State = dict[str, Tensor]
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32]]
ANYRES = PictureArch(mode="squash", tiling="anyres", grid_pinpoints=tuple((a, b) for a, b in PINPOINTS))
SIZES = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
VISION = VisionArch(**SIZES, image_size=32, patch_dim=8, image_mean=(0.4, 0.5, 0.6))
FILES = [picture(1, (70, 34)), picture(2, (40, 90)), picture(3, (32, 32))]


@pytest.fixture
def towers(tmp_path: Path) -> CombineConfig:
    build_tower(CLIPVisionModel).save_pretrained(tmp_path / "clip_hf")
    build_mistral().save_pretrained(tmp_path / "language_hf")
    clip.convert(clip.ClipConfig(input=tmp_path / "clip_hf", output=tmp_path / "vision"))
    mistral.convert(mistral.MistralConfig(input=tmp_path / "language_hf", output=tmp_path / "language"))
    return CombineConfig(vision=tmp_path / "vision", language=tmp_path / "language", output=tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, PictureArch()),
        ({"image_mode": "pad"}, PictureArch(mode="pad")),
        ({"tiling": "anyres", "grid_pinpoints": ("32x64", "64x32", "64x64", "96x32")}, ANYRES),
        (
            {"tiling": "anyres"},
            replace(ANYRES, grid_pinpoints=((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))),
        ),
        ({"tiling": "dynamic"}, PictureArch(mode="squash", tiling="dynamic", max_num_tiles=12)),
        (
            {"tiling": "dynamic", "max_num_tiles": 6, "tile_tags": True},
            PictureArch(mode="squash", tiling="dynamic", max_num_tiles=6, tile_tags=True),
        ),
    ],
)
def test_combine_decides(towers: CombineConfig, options: dict[str, Any], wanted: PictureArch) -> None:
    convert(replace(towers, **options))
    assert load_architecture(towers.output).pictures == wanted


def test_a_tower_of_siglip_squashes(towers: CombineConfig, tmp_path: Path) -> None:
    build_tower(SiglipVisionModel).save_pretrained(tmp_path / "siglip_hf")
    siglip.convert(siglip.SiglipConfig(input=tmp_path / "siglip_hf", output=tmp_path / "siglip"))
    convert(replace(towers, vision=tmp_path / "siglip"))
    assert load_architecture(towers.output).pictures == PictureArch(mode="squash")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiling": "anyres", "grid_pinpoints": ("32",)}, "--grid-pinpoints 32 is not HEIGHTxWIDTH"),
        ({"tiling": "anyres", "grid_pinpoints": ("32x40",)}, "grid pinpoint 32x40 is not made of whole squares of 32"),
        ({"tiling": "anyres", "max_num_tiles": 6}, "anyres takes grid pinpoints and nothing else"),
        ({"tiling": "anyres", "image_mode": "pad"}, "the whole picture beside its tiles is always squashed"),
        ({"tile_tags": True}, "none takes nothing"),
        ({"tiling": "dynamic", "max_num_tiles": -1}, "a positive max_num_tiles"),
        ({"tiling": "anyres", "format": "megatron"}, "Megatron-LM has no anyres tiling"),
    ],
)
def test_options_that_do_not_fit(towers: CombineConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(replace(towers, **options))
    assert not towers.output.exists()


def test_a_new_newline(towers: CombineConfig, tmp_path: Path, read_checkpoint: Callable[[Path], State]) -> None:
    """Drawn as LLaVA draws it, by the seed, beside a projector that does not depend on it."""
    states = []
    for name, seed, tiling in (("a", 1, "anyres"), ("b", 1, "anyres"), ("c", 2, "anyres"), ("d", 1, "none")):
        convert(replace(towers, output=tmp_path / name, seed=seed, tiling=tiling))
        states.append(read_checkpoint(tmp_path / name))
    newline = states[0].pop("vision_projection.image_newline")
    assert newline.shape == (48,) and 0.7 < newline.std() * math.sqrt(48) < 1.3
    assert torch.equal(newline, states[1]["vision_projection.image_newline"])
    assert not torch.equal(newline, states[2]["vision_projection.image_newline"])
    assert_same(states[0], states[3])
    for layout, size in ((ParallelConfig(), 1), (ParallelConfig(tensor_model_parallel_size=2), 2)):
        for found in ranks.run(loaded, layout, size, tmp_path / "a"):
            assert torch.equal(found["vision_projection.image_newline"], newline)


def test_older_descriptions_are_read(tmp_path: Path) -> None:
    save_architecture(Architecture(vision=VISION, pictures=ANYRES), tmp_path)
    path = tmp_path / "model.json"
    assert load_architecture(tmp_path).pictures == ANYRES
    content = json.loads(path.read_text())
    del content["pictures"]
    path.write_text(json.dumps(content))
    assert load_architecture(tmp_path).pictures == PictureArch()
    path.write_text(json.dumps(content | {"pictures": {"mode": "fill"}}))
    with pytest.raises(ValueError, match="image mode 'fill' is none of crop, pad, squash"):
        load_architecture(tmp_path)


def test_a_run_may_take_another_mode() -> None:
    architecture = Architecture(vision=VISION)
    assert with_image_mode(architecture, "") == architecture
    assert with_image_mode(architecture, "pad").pictures == PictureArch(mode="pad")
    with pytest.raises(ValueError, match="the whole picture beside its tiles is always squashed"):
        with_image_mode(replace(architecture, pictures=ANYRES), "pad")
    with pytest.raises(ValueError, match="without its class token"):
        Architecture(vision=replace(VISION, drop_class_token=False), pictures=ANYRES)


@pytest.mark.parametrize("seen", [PictureArch(), PictureArch(mode="pad"), PictureArch(mode="squash"), ANYRES])
def test_processors_do_what_training_does(seen: PictureArch, tmp_path: Path) -> None:
    """Pixels before they are normalised; the crop's corner is the only known difference, and not in these."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor(VISION, seen)))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    architecture = Architecture(vision=VISION, pictures=seen, image_token_id=150)
    ours = Pictures(**architecture.picture_options()).encode(FILES)
    raw = {"do_rescale": False, "do_normalize": False}
    theirs = [torch.tensor(processor(decode_image(data), **raw)["pixel_values"][0]) for data in FILES]
    theirs = [pixels if seen.tiling == "anyres" else pixels[None] for pixels in theirs]
    assert torch.equal(ours.images, torch.cat(theirs))
    if seen.tiling == "none":
        assert read_pictures(tmp_path, VISION) == seen


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        ({"do_pad": True, "size": {"shortest_edge": 32}}, "pad"),
        ({"size": {"height": 32, "width": 32}}, "squash"),
        ({"do_pad": False, "size": {"shortest_edge": 32}, "do_center_crop": True}, "crop"),
        ({"size": 32}, "crop"),
        ({"image_mean": [0, 0, 0]}, None),
        (None, None),
    ],
)
def test_processors_are_read(tmp_path: Path, content: dict[str, Any] | None, mode: str | None) -> None:
    for vision in (VISION, replace(VISION, model_subtype="siglip")):
        for name, whole in (("preprocessor_config", content), ("processor_config", {"image_processor": content})):
            (tmp_path / name).mkdir(exist_ok=True)
            if content is not None:
                (tmp_path / name / f"{name}.json").write_text(json.dumps(whole))
            assert read_pictures(tmp_path / name, vision).mode == (mode or default_pictures(vision).mode)


NEXT: dict[str, tuple[type, type, dict[str, Any]]] = {
    "clip + llama": (CLIPVisionConfig, LlamaConfig, {}),
    "siglip + qwen2": (
        SiglipVisionConfig,
        Qwen2Config,
        {"vision": {"vision_use_head": False}, "vision_feature_select_strategy": "full"},
    ),
}


def sequence(seen: Pictures) -> Tensor:
    """Text around pictures, tokens [1, s]."""
    tokenizer: Any = None  # for tags of tiles, which there are none
    return torch.tensor([[5, 6, *(id for data in FILES for id in (*seen.ids(data, tokenizer), 7, 8, 9))]])


def our_logits(folder: Path) -> Tensor:
    from mmcore.checkpoint import load_checkpoint
    from mmcore.models.llava import LlavaModel, base_config

    architecture = load_architecture(folder)
    model = LlavaModel(architecture, "local", **base_config(ParallelConfig())).eval()
    load_checkpoint(folder, model)
    seen = Pictures(**architecture.picture_options())
    tokens = sequence(seen)
    encoded = seen.encode(FILES)
    with torch.no_grad():
        return model(tokens, encoded.images, image_sources=encoded.sources).unflatten(0, tokens.shape)


@torch.no_grad()
def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    """By transformers alone, from the exported folder: its processor's pixels, its order of features."""
    model, info = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    inputs = processor([decode_image(data) for data in FILES], return_tensors="pt")
    return model(input_ids=tokens, **inputs).logits


@pytest.mark.parametrize("name", NEXT)
def test_a_llava_next_comes_and_leaves(tmp_path: Path, name: str) -> None:
    """The whole path of tiles: logits at every place, with three pictures of other layouts in one sequence."""
    tower, language, changes = NEXT[name]
    model = build_llava(tower, language, LlavaNextForConditionalGeneration, image_grid_pinpoints=PINPOINTS, **changes)
    model.save_pretrained(tmp_path / "hf")
    report = llava.convert(llava.LlavaConfig(input=tmp_path / "hf", output=tmp_path / "model"))
    assert any("16 for each square of an image, which anyres tiling cuts" in line for line in report)
    architecture = load_architecture(tmp_path / "model")
    assert architecture.pictures == ANYRES
    export(ExportConfig(input=tmp_path / "model", output=tmp_path / "exported"))
    hub = {
        key.replace("vision_tower.", "vision_tower.vision_model."): value
        for key, value in load(tmp_path / "hf").items()
    }
    assert_same(load(tmp_path / "exported"), hub)
    tokens = sequence(Pictures(**architecture.picture_options()))
    assert tokens.shape[1] > 150
    theirs = their_logits(tmp_path / "exported", tokens)
    (ours,) = ranks.run(our_logits, ParallelConfig(), 1, tmp_path / "model")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def load(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def test_a_llava_next_is_proven(tmp_path: Path) -> None:
    """--verify: all but the newline, whose tensor the export gives back."""
    model = build_llava(
        CLIPVisionConfig, LlamaConfig, LlavaNextForConditionalGeneration, image_grid_pinpoints=PINPOINTS
    )
    model.save_pretrained(tmp_path / "hf")
    llava.convert(llava.LlavaConfig(input=tmp_path / "hf", output=tmp_path / "model"))
    assert parity.check(tmp_path / "model", tmp_path / "hf") < parity.TOLERANCE


def test_the_same_as_llava_keeps_it(tmp_path: Path, read_checkpoint: Callable[[Path], State]) -> None:
    """LLaVA-1.6's own folder, as liuhaotian/llava-v1.6-vicuna-7b has it: pinpoints by (width, height)."""
    model = build_llava(
        CLIPVisionConfig, LlamaConfig, LlavaNextForConditionalGeneration, image_grid_pinpoints=PINPOINTS
    )
    model.save_pretrained(tmp_path / "hf")
    options = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [pinpoint[::-1] for pinpoint in PINPOINTS],
    }
    folder = write_original(tmp_path / "llava-tiny", model, **options)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights["model.image_newline"] = model.state_dict()["model.image_newline"]
    torch.save(weights, folder / "pytorch_model.bin")
    states = []
    for name in ("hf", "llava-tiny"):
        llava.convert(llava.LlavaConfig(input=tmp_path / name, output=tmp_path / "model", overwrite=True))
        assert load_architecture(tmp_path / "model").pictures == ANYRES
        states.append(without_tables(read_checkpoint(tmp_path / "model")))
    assert_same(*states)
    del weights["model.image_newline"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing: model.image_newline \[64\]"):
        llava.convert(llava.LlavaConfig(input=folder, output=tmp_path / "model", overwrite=True))


def without_tables(state: State) -> State:
    """Without the tables of the vocabulary, in which the hub's folder has a row for the image token."""
    return {name: tensor for name, tensor in state.items() if "word_embeddings" not in name and "output" not in name}


def test_places_of_tiles(tmp_path: Path) -> None:
    """transformers' processor of an export puts as many places into a text as training does."""
    write_tokenizer(tmp_path / "hf")
    build_mistral(vocab_size=300).save_pretrained(tmp_path / "hf")
    build_tower(CLIPVisionModel).save_pretrained(tmp_path / "clip_hf")
    clip.convert(clip.ClipConfig(input=tmp_path / "clip_hf", output=tmp_path / "vision"))
    mistral.convert(mistral.MistralConfig(input=tmp_path / "hf", output=tmp_path / "language"))
    parts = {"vision": tmp_path / "vision", "language": tmp_path / "language"}
    convert(CombineConfig(**parts, output=tmp_path / "model", tiling="anyres"))
    export(ExportConfig(input=tmp_path / "model", output=tmp_path / "exported"))
    processor = AutoProcessor.from_pretrained(tmp_path / "exported")
    assert type(processor) is LlavaNextProcessor
    seen = Pictures(**load_architecture(tmp_path / "model").picture_options())
    for data in FILES:
        ids = processor(text="<image>", images=[decode_image(data)], add_special_tokens=False)["input_ids"][0]
        tokenizer: Any = None
        assert len(ids) == len(seen.ids(data, tokenizer)) and set(ids) == {processor.image_token_id}


def test_dynamic_tiles_do_not_leave(towers: CombineConfig, tmp_path: Path) -> None:
    convert(replace(towers, tiling="dynamic"))
    with pytest.raises(ValueError, match="dynamic tiles, and none of Hugging Face's LLaVA models"):
        export(ExportConfig(input=towers.output, output=tmp_path / "exported"))
    export(ExportConfig(input=towers.output, output=tmp_path / "exported", part="vision"))
    content = json.loads((tmp_path / "exported" / "preprocessor_config.json").read_text())
    assert content["image_processor_type"] == "SiglipImageProcessor"
