"""What stands beside the weights of an export: how Hugging Face describes our architectures.

transformers' own classes write the configurations; what its versions before 5 and serving engines look
for under other names is there as well. Each is read again as an import would read it, and refused if
that is not the architecture that it was made from.
"""

import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import decoder
import encoder
import llama
import mistral
import qwen2
import transformers

from mmcore.constants import IMAGE_TAG
from mmcore.models.architecture import Architecture, LanguageArch, RotaryScaling, VisionArch

CONFIG_FILE = "config.json"

_LANGUAGE: dict[str, tuple[Any, str, decoder.Family]] = {
    "llama": (transformers.LlamaConfig, "LlamaForCausalLM", llama.FAMILY),
    "mistral": (transformers.MistralConfig, "MistralForCausalLM", mistral.FAMILY),
    "qwen2": (transformers.Qwen2Config, "Qwen2ForCausalLM", qwen2.FAMILY),
}
_VISION: dict[str, tuple[Any, str, encoder.Family]] = {
    "clip": (transformers.CLIPVisionConfig, "CLIPVisionModel", encoder.CLIP),
    # Its head pools features that are not used here, and none of its weights are kept.
    "siglip": (partial(transformers.SiglipVisionConfig, vision_use_head=False), "SiglipVisionModel", encoder.SIGLIP),
}
_ACTIVATIONS = {ours: theirs for theirs, ours in encoder.ACTIVATIONS.items()}


def check_projector(architecture: Architecture) -> None:
    """Raise a ValueError if there is a projector that Hugging Face's LLaVA does not have."""
    arch, language = architecture.vision_projection, architecture.language
    if arch is None or language is None or arch.ffn_hidden_size == language.hidden_size:
        return
    shape = "one linear layer" if arch.projector_type == "affine" else f"two layers, {arch.ffn_hidden_size} wide inside"
    raise ValueError(
        f"the projector is {shape}, and Hugging Face's LLaVA has two layers that are as wide as the language model "
        f"({language.hidden_size}), no other: export the towers by --part language and --part vision, or train with "
        "combine.py's --projector mlp2x_gelu to serve it as LLaVA"
    )


def config(
    architecture: Architecture, dtype: str, special_ids: dict[str, int | None], checkpoint: Path
) -> dict[str, Any]:
    """config.json of a whole model or of one tower.

    Args:
        architecture: vocab_size and image_token_id as the export has them.
        dtype: of the weights, by torch's name.
        special_ids: of the tokenizer, as configurations name them.
        checkpoint: where the architecture was read, for messages.
    Raises:
        ValueError: Hugging Face's model of that name cannot be what the architecture says.
    """
    vision, projector, language = architecture.vision, architecture.vision_projection, architecture.language
    path = checkpoint / CONFIG_FILE
    towers: dict[str, dict[str, Any]] = {}
    if vision is not None:
        towers["vision_config"] = _vision_config(vision, dtype, path)
    if language is not None:
        towers["text_config"] = _language_config(language, dtype, special_ids, path)
    if projector is None:
        (tower,) = towers.values()
        return tower
    assert vision is not None and language is not None
    pictures = architecture.pictures
    kind: Any = transformers.LlavaNextConfig if pictures.tiling == "anyres" else transformers.LlavaConfig
    pinpoints = {"image_grid_pinpoints": [list(pinpoint) for pinpoint in pictures.grid_pinpoints]}
    llava = kind(
        **towers,
        **(pinpoints if pictures.tiling == "anyres" else {}),
        image_token_index=architecture.image_token_id,
        image_seq_length=vision.num_image_embeddings,
        projector_hidden_act=_ACTIVATIONS[projector.activation],
        vision_feature_select_strategy=_select_strategy(vision),
        vision_feature_layer=vision.feature_layer,
        multimodal_projector_bias=projector.add_bias_linear,
        tie_word_embeddings=language.share_embeddings_and_output_weights,
        architectures=[kind.__name__.replace("Config", "ForConditionalGeneration")],
        dtype=dtype,
    )
    return _content(llava) | towers


def generation_config(special_ids: dict[str, int | None]) -> dict[str, Any]:
    """generation_config.json."""
    return json.loads(transformers.GenerationConfig(**special_ids).to_json_string())


def processor(architecture: Architecture) -> dict[str, Any]:
    """processor_config.json, which says how many places one picture takes."""
    arch = architecture.vision
    assert arch is not None
    return {
        "processor_class": "LlavaNextProcessor" if architecture.pictures.tiling == "anyres" else "LlavaProcessor",
        "image_token": IMAGE_TAG,
        "patch_size": arch.patch_dim,
        "num_additional_image_tokens": int(arch.has_class_token),
        "vision_feature_select_strategy": _select_strategy(arch),
    }


def _select_strategy(arch: VisionArch) -> str:
    """ "default" leaves out the first feature, which is the class token's."""
    return "default" if arch.has_class_token and arch.drop_class_token else "full"


def _language_config(arch: LanguageArch, dtype: str, special_ids: dict[str, int | None], path: Path) -> dict[str, Any]:
    kind, name, family = _LANGUAGE[arch.model_type]
    scaling = _scaling(arch.rotary_scaling) if arch.rotary_scaling else None
    content = _content(
        kind(
            vocab_size=arch.vocab_size,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.ffn_hidden_size,
            num_hidden_layers=arch.num_layers,
            num_attention_heads=arch.num_attention_heads,
            num_key_value_heads=arch.num_query_groups,
            head_dim=arch.kv_channels,
            max_position_embeddings=arch.max_position_embeddings,
            rms_norm_eps=arch.layernorm_epsilon,
            rope_parameters={"rope_theta": arch.rotary_base, **(scaling or {"rope_type": "default"})},
            tie_word_embeddings=arch.share_embeddings_and_output_weights,
            architectures=[name],
            dtype=dtype,
            **({"sliding_window": arch.sliding_window} if arch.model_type == "mistral" else {}),
            **special_ids,
        )
    )
    content |= {"rope_theta": arch.rotary_base, "rope_scaling": scaling}
    _check_same(decoder.read_architecture(content, path, family), arch)
    return content


def _scaling(scaling: RotaryScaling) -> dict[str, Any]:
    names = ["rope_type", "factor"]
    if scaling.rope_type == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    return {name: getattr(scaling, name) for name in names}


def _vision_config(arch: VisionArch, dtype: str, path: Path) -> dict[str, Any]:
    kind, name, family = _VISION[arch.model_subtype]
    content = _content(
        kind(
            hidden_size=arch.hidden_size,
            intermediate_size=arch.ffn_hidden_size,
            num_hidden_layers=arch.num_layers,
            num_attention_heads=arch.num_attention_heads,
            image_size=arch.image_size,
            patch_size=arch.patch_dim,
            hidden_act=_ACTIVATIONS.get(arch.activation, arch.activation),
            layer_norm_eps=arch.layernorm_epsilon,
            architectures=[name],
            dtype=dtype,
        )
    )
    elsewhere = {name: getattr(arch, name) for name in ("drop_class_token", "image_mean", "image_std")}
    found = encoder.read_architecture(content, path, family, arch.feature_layer)
    _check_same(replace(found, **elsewhere), arch)
    return content


def _content(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    content = json.loads(config.to_json_string())
    return content | {"torch_dtype": content["dtype"]}


def _check_same(found: LanguageArch | VisionArch, arch: LanguageArch | VisionArch) -> None:
    lost = [
        f"{field.name} {getattr(arch, field.name)} (it would be {getattr(found, field.name)})"
        for field in fields(arch)
        if getattr(found, field.name) != getattr(arch, field.name)
    ]
    if lost:
        kind = arch.model_type if isinstance(arch, LanguageArch) else arch.model_subtype
        raise ValueError(f"Hugging Face's {kind} models cannot say {', '.join(lost)}: this model cannot leave as one")
