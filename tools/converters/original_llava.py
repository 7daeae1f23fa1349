"""LLaVA as its own training leaves it: LLaMA's names, the projector among them, the vision tower by name.

Source: haotian-liu/LLaVA llava/model/llava_arch.py, multimodal_encoder/clip_encoder.py,
multimodal_projector/builder.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import clip
import decoder
import encoder
import llama
import mistral
import projector
import siglip
from conversion import Conversion, ConverterConfig
from hugging_face import Part, apply_parts, projector_part
from picture_processors import original_pictures
from weight_files import Weights, open_file, open_folder, read_json

from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL
from mmcore.models.architecture import Architecture, VisionArch
from mmcore.models.presets import PROJECTOR, VISION, compose

FAMILIES = {"llava": llama.FAMILY, "llava_llama": llama.FAMILY, "llava_mistral": mistral.FAMILY}
PROJECTORS = ("mlp2x_gelu", "linear")

# Where a model keeps its parts. Only one that tuned its vision tower (or a LLaVA-1.6) holds it.
TOWER, BETWEEN = "model.vision_tower.vision_tower.", "model.mm_projector."
NEWLINE = "model.image_newline"

PROJECTOR_FILE = "mm_projector.bin"
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")

# Towers that are known by their names on the hub: a wrong one would often fit, and answer nonsense.
TOWERS = {
    "openai/clip-vit-base-patch16": VISION["clip_vit_b_16"],
    "openai/clip-vit-large-patch14": VISION["clip_vit_l_14"],
    "openai/clip-vit-large-patch14-336": VISION["clip_vit_l_14_336"],
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": VISION["clip_vit_h_14"],
    "google/siglip-base-patch16-224": VISION["siglip_base_patch16_224"],
    "google/siglip-so400m-patch14-384": VISION["siglip_so400m_patch14_384"],
}


def refuse_incomplete(folder: Path) -> None:
    """Raise a ValueError if an input is less than a model: its projector alone, or an adapter."""
    if any((folder / name).is_file() for name in ADAPTERS):
        raise ValueError(
            f"--input {folder} holds an adapter (LoRA), which is not a model: merge it into its base model first, by "
            "LLaVA's scripts/merge_lora_weights.py"
        )
    is_projector = (folder / PROJECTOR_FILE).is_file() and not any((folder / name).is_file() for name in WEIGHTS)
    if folder.is_file() or is_projector:
        raise ValueError(
            f"--input {folder} is not the folder of a whole model. A projector alone ({PROJECTOR_FILE}) is for joining "
            "two towers: convert the language model that it was trained for by llama.py or mistral.py and the vision "
            "tower by clip.py, then join them by combine.py --projector-weights"
        )


def canonical_name(name: str) -> str:
    """A tensor by the name that `_parts` gives it: the vision tower without Hugging Face's prefix."""
    return TOWER + encoder.canonical_name(name.removeprefix(TOWER)) if name.startswith(TOWER) else name


def plan(config: ConverterConfig, tower: Path | None, content: dict[str, Any], path: Path) -> Conversion:
    """Plan the conversion.

    Args:
        tower: where the vision tower is, if not beside the input under its name.
        content: the folder's config.json.
        path: where that was read.
    Raises:
        ValueError: the input or the tower does not fit.
    """
    _refuse_unsupported(content, path)
    name, family = str(content["mm_vision_tower"]), FAMILIES[content["model_type"]]
    place = _find_tower(config.input, tower, name)
    beside = _plan_tower(config, place, name)
    assert beside.architecture.vision is not None
    _check_tower(beside.architecture.vision, place, content, name)
    vision = _with_features(beside.architecture.vision, content)
    language = decoder.read_architecture({**content, "model_type": family.model_type}, path, family)
    architecture = compose(
        vision,
        language,
        PROJECTOR[content.get("mm_projector_type", "linear")](language),
        pictures=original_pictures(content, path, vision),
    )
    parts = _parts(architecture)
    weights = _with_projector(open_folder(config.input), config.input / PROJECTOR_FILE).renamed(canonical_name)
    holds_tower = any(key.startswith(TOWER) for key in weights.headers)
    tensors, dropped = apply_parts(parts if holds_tower else parts[1:], weights, config.dtype)
    files, notes = weights.files, [f"vision tower: {'its own, built as ' if holds_tower else ''}{place}"]
    if not holds_tower:
        tensors, dropped, files = beside.tensors | tensors, beside.dropped + dropped, (*beside.files, *files)
    return Conversion(
        architecture=architecture,
        tensors=tensors,
        dropped=dropped,
        files=files,
        references=(config.input, place),
        notes=tuple(notes),
    )


def _parts(architecture: Architecture) -> tuple[Part, Part, Part]:
    vision, language = architecture.vision, architecture.language
    assert vision is not None and language is not None
    return (
        Part(module=VISION_MODEL, prefix=TOWER, rows=encoder.weight_map(vision), num_layers=vision.num_layers),
        projector_part(architecture, BETWEEN, projector.LLAVA, NEWLINE),
        Part(module=LANGUAGE_MODEL, prefix="", rows=decoder.weight_map(language), num_layers=language.num_layers),
    )


def _refuse_unsupported(content: dict[str, Any], path: Path) -> None:
    wrong: list[str] = []
    for name, known, default in (
        ("model_type", tuple(FAMILIES), None),
        ("mm_projector_type", PROJECTORS, "linear"),
        ("mm_vision_select_feature", ("patch", "cls_patch"), "patch"),
    ):
        if (value := content.get(name, default)) not in known:
            wrong.append(f"{name} is {value!r}, known are {', '.join(known)}")
    for name, reason in (
        ("mm_use_im_start_end", "it puts learnt tokens around every picture"),
        ("mm_resampler_type", "it resamples the features"),
        ("s2", "it takes pictures at several scales"),
    ):
        if content.get(name):
            wrong.append(f"{name} is {content[name]!r}: {reason}")
    if not isinstance(layer := content.get("mm_vision_select_layer"), int):
        wrong.append(f"mm_vision_select_layer is {layer}, which is no number of a layer")
    if not content["mm_vision_tower"]:
        wrong.append("mm_vision_tower is empty: there is no vision tower")
    if wrong:
        raise ValueError(f"{path} asks for what is not supported: {'; '.join(wrong)}")


def _find_tower(folder: Path, tower: Path | None, name: str) -> Path:
    beside = folder.resolve().parent
    places = (tower,) if tower else (beside / name, beside / Path(name).name)
    for place in places:
        if place.exists():
            return place
    if tower:
        raise ValueError(f"--vision-tower {tower} does not exist")
    raise ValueError(
        f"{folder} names its vision tower, {name}, and does not hold it: download it, and say where it is by "
        "--vision-tower"
    )


def _plan_tower(config: ConverterConfig, place: Path, name: str) -> Conversion:
    options: dict[str, Any] = {"input": place, "output": config.output, "dtype": config.dtype, "feature_layer": -1}
    description = place / clip.HUGGING_FACE_CONFIG
    if description.is_file() and str(read_json(description).get("model_type")).startswith("siglip"):
        return siglip.plan(siglip.SiglipConfig(**options))
    if place.is_file():  # a state dict does not tell its activation, but the name of the tower does
        if not name.startswith("openai/"):
            raise ValueError(
                f"--vision-tower {place} is a file, which is taken of OpenAI's towers only: give the Hugging Face "
                f"folder of {name}"
            )
        options["activation"] = "quick_gelu"
    return clip.plan(clip.ClipConfig(**options))


def _check_tower(vision: VisionArch, place: Path, content: dict[str, Any], name: str) -> None:
    wanted: dict[str, Any] = {"hidden_size": content.get("mm_hidden_size", vision.hidden_size)}
    if known := TOWERS.get(name):
        wanted |= {field: getattr(known, field) for field in ("hidden_size", "num_layers", "image_size", "patch_dim")}
    differing = [
        f"{field} {getattr(vision, field)} instead of {value}"
        for field, value in wanted.items()
        if getattr(vision, field) != value
    ]
    if differing:
        raise ValueError(
            f"{place} is not {name}, the vision tower that the model was trained with: it has {', '.join(differing)}"
        )


def _with_features(vision: VisionArch, content: dict[str, Any]) -> VisionArch:
    layer = encoder.feature_layer(content["mm_vision_select_layer"], vision.num_layers)
    if not vision.has_class_token:
        return replace(vision, feature_layer=layer)
    is_dropped = content.get("mm_vision_select_feature", "patch") == "patch"
    return replace(vision, feature_layer=layer, drop_class_token=is_dropped)


def _with_projector(weights: Weights, file: Path) -> Weights:
    """The weights, and the projector of `file` among them where they lack one."""
    if any(name.startswith(BETWEEN) for name in weights.headers) or not file.is_file():
        return weights
    trained = open_file(file).renamed(projector.canonical_name)
    own = trained.renamed(lambda name: BETWEEN + name)
    return replace(
        weights,
        files=(*weights.files, file),
        headers=weights.headers | own.headers,
        read=lambda name: (own if name in own.headers else weights).read(name),
    )
