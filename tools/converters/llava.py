"""Convert a whole LLaVA or LLaVA-NeXT: the hub's llava-hf folder, or one as LLaVA's own training leaves it.

`python tools/converters/llava.py --input llava-1.5-7b-hf --output model`
`python tools/converters/llava.py --input llava-v1.5-7b --vision-tower clip-vit-large-patch14-336 --output model`

A folder of LLaVA's own names its vision tower, and mostly does not hold it.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import decoder
import encoder
import llama
import mistral
import original_llava
import qwen2
from command_line import run
from conversion import Conversion, ConverterConfig, carry_out
from hugging_face import apply_parts, canonical_name, parts
from picture_processors import anyres, places, read_pictures
from tokenizer_files import find_tokenizer
from weight_files import open_folder, read_json

from mmcore.models.architecture import Architecture, LanguageArch, ProjectorArch

FAMILIES = {family.model_type: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY)}

# Files of a llava-hf folder that say how it is used, beside its tokenizer's.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "generation_config.json")

# What config.json of a llava-hf folder calls it.
HUB_KINDS = ("llava", "llava_next")

# Relatives whose pictures become another sequence than one block of patches.
RELATIVES = {
    "llava_next_video": "it takes videos, and tiles with learnt separators between their rows",
    "llava_onevision": "it cuts pictures into tiles, with learnt separators between their rows",
    "video_llava": "it takes videos, by a second vision tower",
    "vipllava": "its projector takes the features of several layers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaConfig(ConverterConfig):
    """Convert a whole LLaVA: the hub's llava-hf folder, or one as LLaVA's own training leaves it."""

    vision_tower: Path | None = None
    """Vision tower that a folder of LLaVA's own names, as clip.py and siglip.py take it; by default what has that
    name beside the input."""
    conversation: str = ""
    """Template it was tuned with; by default vicuna_v1 on LLaMA 2, llama3 on LLaMA 3, mistral_instruct on Mistral,
    chatml on Qwen2."""


def read_architecture(content: dict[str, Any], path: Path) -> Architecture:
    """The architecture that the config.json of a llava-hf folder describes, a LLaVA or a LLaVA-NeXT.

    Keys that it lacks mean the defaults of transformers' classes: the hub's llava-1.5-7b-hf leaves out
    even its language model's width.

    Args:
        path: where it was read; what is done to pictures is looked for beside it.
    Raises:
        ValueError: not such a configuration, or it asks for what is not supported.
    """
    import transformers  # seconds, which a folder of LLaVA's own can do without

    _refuse_unsupported(content, path)
    kind = transformers.LlavaNextConfig if content.get("model_type") == "llava_next" else transformers.LlavaConfig
    try:
        whole: Any = kind(**content)
    except Exception as error:  # its checks raise errors of their own
        raise ValueError(f"{path} is not a configuration that transformers takes ({error})") from None
    text, tower = whole.text_config.to_dict(), whole.vision_config.to_dict()
    layer = encoder.feature_layer(whole.vision_feature_layer, tower["num_hidden_layers"])
    vision = encoder.read_architecture(tower, path, encoder.FAMILIES[tower["model_type"]], layer)
    if vision.has_class_token:
        vision = replace(vision, drop_class_token=whole.vision_feature_select_strategy == "default")
    language = decoder.read_architecture(text, path, FAMILIES[text["model_type"]])
    pictures = read_pictures(path.parent, vision)
    if kind is transformers.LlavaNextConfig:
        pictures = anyres(tuple((int(height), int(width)) for height, width in whole.image_grid_pinpoints))
    return Architecture(
        vision=vision,
        pictures=pictures,
        vision_projection=ProjectorArch(
            ffn_hidden_size=language.hidden_size,
            add_bias_linear=whole.multimodal_projector_bias,
            activation=encoder.ACTIVATIONS[whole.projector_hidden_act],
        ),
        language=replace(language, share_embeddings_and_output_weights=whole.tie_word_embeddings),
        image_token_id=whole.image_token_index,
    )


def _refuse_unsupported(content: dict[str, Any], path: Path) -> None:
    text = (content.get("text_config") or {}).get("model_type", "llama")
    tower = (content.get("vision_config") or {}).get("model_type", encoder.CLIP.tower)
    strategy = content.get("vision_feature_select_strategy", "default")
    wrong: list[str] = []
    if text not in FAMILIES:
        wrong.append(f"text_config is of a {text!r}, known are {', '.join(FAMILIES)}")
    if tower not in encoder.FAMILIES:
        wrong.append(f"vision_config is of a {tower!r}, known are {', '.join(encoder.FAMILIES)}")
    if not isinstance(layer := content.get("vision_feature_layer", -2), int):
        wrong.append(f"vision_feature_layer is {layer}, only the features of one layer are supported")
    if strategy not in ("default", "full"):
        wrong.append(f"vision_feature_select_strategy is {strategy!r}, known are 'default' and 'full'")
    if strategy == "default" and tower == encoder.SIGLIP.tower:
        wrong.append("vision_feature_select_strategy 'default' drops SigLIP's first patch, which is no class token")
    if (activation := content.get("projector_hidden_act", "gelu")) not in encoder.ACTIVATIONS:
        wrong.append(f"projector_hidden_act is {activation!r}, known are {', '.join(encoder.ACTIVATIONS)}")
    if wrong:
        raise ValueError(f"{path} asks for what is not supported: {'; '.join(wrong)}")


def _plan_hub(config: LlavaConfig, content: dict[str, Any], path: Path) -> Conversion:
    architecture = read_architecture(content, path)
    weights = open_folder(config.input).renamed(canonical_name)
    tensors, dropped = apply_parts(parts(architecture), weights, config.dtype)
    return Conversion(
        architecture=architecture,
        tensors=tensors,
        dropped=dropped,
        files=weights.files,
        references=(config.input,),
    )


def plan(config: LlavaConfig) -> Conversion:
    """Plan the conversion.

    Raises:
        ValueError: the input does not fit.
    """
    original_llava.refuse_incomplete(config.input)
    path = config.input / "config.json"
    content = read_json(path)
    encoder.refuse_quantized(content, path)
    if (kind := content.get("model_type")) in RELATIVES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported: {RELATIVES[kind]}")
    if "mm_vision_tower" in content:
        conversion = original_llava.plan(config, config.vision_tower, content, path)
    elif kind in HUB_KINDS and config.vision_tower is None:
        conversion = _plan_hub(config, content, path)
    elif kind in HUB_KINDS:
        raise ValueError(f"{path} is of a llava-hf folder, which holds its vision tower: leave out --vision-tower")
    else:
        raise ValueError(
            f"{path}: model_type is {kind!r} and there is no mm_vision_tower: this converter takes llava-hf folders "
            f"({' and '.join(map(repr, HUB_KINDS))}) and those of LLaVA's own training"
        )
    architecture = conversion.architecture
    vision, language = architecture.vision, architecture.language
    assert vision is not None and language is not None and architecture.image_token_id is not None
    tokenizer = find_tokenizer(config.input, language.vocab_size)
    place = "in" if architecture.image_token_id < language.vocab_size else "after"
    return replace(
        conversion,
        architecture=replace(architecture, conversation=config.conversation or _conversation(language)),
        tokenizer=(*tokenizer, *(config.input / name for name in PROCESSOR_FILES if (config.input / name).is_file())),
        notes=(
            *encoder.notes(vision),
            *decoder.notes(language, tokenizer),
            f"image token {architecture.image_token_id}, {place} the vocabulary; {vision.num_image_embeddings} for "
            f"{places(architecture.pictures)}",
            *conversion.notes,
        ),
    )


def _conversation(language: LanguageArch) -> str:
    if language.model_type == "llama":
        return "llama3" if language.vocab_size >= 128_000 else "vicuna_v1"
    return FAMILIES[language.model_type].conversation


def convert(config: LlavaConfig) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    conversion = plan(config)
    return carry_out(config, conversion, *conversion.references)


if __name__ == "__main__":
    sys.exit(run(LlavaConfig, convert))
