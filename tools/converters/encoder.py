"""Vision transformers as Hugging Face keeps them: one weight map for CLIP and SigLIP."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conversion import Conversion, ConverterConfig
from decoder import number
from layout import as_token, group_qkv
from weight_files import Weights, open_folder, read_json
from weight_map import Drop, Move, apply

from mmcore.constants import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    SIGLIP_IMAGE_MEAN,
    SIGLIP_IMAGE_STD,
    VISION_MODEL,
)
from mmcore.models.architecture import Activation, Architecture, VisionArch
from mmcore.models.presets import default_pictures

Statistic = tuple[float, float, float]
"""Of red, green and blue."""

# Hugging Face's names of activations.
ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Files that may hold the pixel statistics: transformers 4's of the image processor, 5's of all processors.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What sets one family's config.json apart."""

    model_subtype: Literal["clip", "siglip"]
    whole: str
    """model_type of the whole model, which has the tower's configuration under vision_config."""
    tower: str
    """model_type of the tower alone."""
    # What a missing key means (transformers' CLIPVisionConfig and SiglipVisionConfig).
    sizes: dict[str, Any]
    image_mean: Statistic
    image_std: Statistic


_SIZES = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072}
CLIP = Family(
    model_subtype="clip",
    whole="clip",
    tower="clip_vision_model",
    sizes={**_SIZES, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    image_mean=CLIP_IMAGE_MEAN,
    image_std=CLIP_IMAGE_STD,
)
SIGLIP = Family(
    model_subtype="siglip",
    whole="siglip",
    tower="siglip_vision_model",
    sizes={**_SIZES, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    image_mean=SIGLIP_IMAGE_MEAN,
    image_std=SIGLIP_IMAGE_STD,
)
FAMILIES = {family.tower: family for family in (CLIP, SIGLIP)}


def canonical_name(name: str) -> str:
    """A tower's tensor by the name that it has in the tower alone: transformers 5 left out the prefix."""
    return name.removeprefix("vision_model.")


def weight_map(arch: VisionArch) -> tuple[Move | Drop, ...]:
    """From Hugging Face's names, as `canonical_name` gives them.

    Source: transformers models/clip/modeling_clip.py, models/siglip/modeling_siglip.py.
    """
    h, f, p = arch.hidden_size, arch.ffn_hidden_size, arch.patch_dim
    block, layers = "encoder.layers.{}.", f"{VISION_MODEL}.decoder.layers."
    qkv = group_qkv(arch.num_attention_heads, arch.num_attention_heads)
    both: list[Move] = []
    for kind, columns in (("weight", (h,)), ("bias", ())):
        both += [
            Move(f"{layers}self_attention.linear_qkv.layer_norm_{kind}", {f"{block}layer_norm1.{kind}": (h,)}),
            Move(
                f"{layers}self_attention.linear_qkv.{kind}",
                {f"{block}self_attn.{name}_proj.{kind}": (h, *columns) for name in "qkv"},
                qkv,
            ),
            Move(f"{layers}self_attention.linear_proj.{kind}", {f"{block}self_attn.out_proj.{kind}": (h, *columns)}),
            Move(f"{layers}mlp.linear_fc1.layer_norm_{kind}", {f"{block}layer_norm2.{kind}": (h,)}),
            Move(f"{layers}mlp.linear_fc1.{kind}", {f"{block}mlp.fc1.{kind}": (f, *columns)}),
            Move(f"{layers}mlp.linear_fc2.{kind}", {f"{block}mlp.fc2.{kind}": (h, f) if kind == "weight" else (h,)}),
            Move(f"{VISION_MODEL}.ln_post.{kind}", {f"post_layernorm.{kind}": (h,)}),
        ]
    if arch.model_subtype == "clip":
        both += [
            Move(f"{VISION_MODEL}.class_token", {"embeddings.class_embedding": (h,)}, as_token),
            *(Move(f"{VISION_MODEL}.ln_pre.{kind}", {f"pre_layrnorm.{kind}": (h,)}) for kind in ("weight", "bias")),
        ]
    else:
        both.append(Move(f"{VISION_MODEL}.conv1.bias", {"embeddings.patch_embedding.bias": (h,)}))
    return (
        *both,
        Move(f"{VISION_MODEL}.conv1.weight", {"embeddings.patch_embedding.weight": (h, 3, p, p)}),
        # Row 0 is the class token's on both sides, where there is one.
        Move(
            f"{VISION_MODEL}.position_embeddings.weight",
            {"embeddings.position_embedding.weight": (arch.num_positions, h)},
        ),
        *(Drop(pattern, "contrastive head: features are taken before it") for pattern in HEAD),
        *(Drop(pattern, "text tower: the language model takes its place") for pattern in TEXT_TOWER),
        Drop("embeddings.position_ids", "counts from 0"),
    )


HEAD = ("head.*", "visual_projection.weight", "logit_scale", "logit_bias")
TEXT_TOWER = ("text_model.*", "text_projection.weight")


def read_architecture(config: dict[str, Any], path: Path, family: Family, feature_layer: int) -> VisionArch:
    """The architecture that a config.json, or a part of one, describes.

    Args:
        path: where it was read; pixel statistics are looked for beside it.
    Raises:
        ValueError: not of this family, or it asks for what is not supported.
    """
    refuse_quantized(config, path)
    kind = config.get("model_type")
    if kind == family.whole:
        config = _vision_config(config)
    elif kind != family.tower:
        raise ValueError(f"{path}: model_type is {kind!r}; this converter takes {family.whole!r} and {family.tower!r}")
    config = {**family.sizes, **config}
    if config.get("num_channels", 3) != 3:
        raise ValueError(f"{path}: num_channels is {config['num_channels']}; only colour pictures are supported")
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act is {config['hidden_act']!r}; known are {', '.join(ACTIVATIONS)}")
    image_mean, image_std = _processor_statistics(path.parent, family)
    return VisionArch(
        model_subtype=family.model_subtype,
        num_layers=number(config, path, "num_hidden_layers"),
        hidden_size=number(config, path, "hidden_size"),
        ffn_hidden_size=number(config, path, "intermediate_size"),
        num_attention_heads=number(config, path, "num_attention_heads"),
        image_size=number(config, path, "image_size"),
        patch_dim=number(config, path, "patch_size"),
        activation=ACTIVATIONS[config["hidden_act"]],
        layernorm_epsilon=number(config, path, "layer_norm_eps", float),
        feature_layer=feature_layer,
        image_mean=image_mean,
        image_std=image_std,
    )


def _vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """The tower's part of a whole model's configuration.

    CLIP's first folders carry it twice, and there transformers takes vision_config_dict, and its defaults
    for what that lacks (transformers CLIPConfig).
    """
    first = config.get("vision_config_dict")
    return (config.get("vision_config") or {}) if first is None else first


def feature_layer(hidden_state: int, num_layers: int) -> int:
    """A hidden state as `VisionArch` counts them, from the end; from the start, 0 is what the first layer sees."""
    return hidden_state if hidden_state < 0 else hidden_state - num_layers - 1


def refuse_quantized(config: dict[str, Any], path: Path) -> None:
    """Raise a ValueError if the weights beside a config.json are quantised."""
    if config.get("quantization_config"):
        raise ValueError(
            f"{path} has a quantization_config: quantised weights cannot be converted, take the model as it was before"
        )


def _processor_statistics(folder: Path, family: Family) -> tuple[Statistic, Statistic]:
    """Mean and deviation by which the folder's image processor scales pixels; the family's own if it has none."""
    for path in (folder / name for name in PROCESSORS):
        content = read_json(path) if path.is_file() else {}
        content = content.get("image_processor", content)
        if isinstance(content, dict) and {"image_mean", "image_std"} <= content.keys():
            return pixel_statistics(content["image_mean"], content["image_std"], path)
    return family.image_mean, family.image_std


def pixel_statistics(mean: Any, std: Any, path: Path) -> tuple[Statistic, Statistic]:
    """Mean and deviation of pixels as a configuration has them, checked.

    Args:
        path: where they were read, for messages.
    Raises:
        ValueError: one of them is not a list of three numbers, or a deviation is 0.
    """
    for values, lowest in ((mean, 0.0), (std, 1e-6)):
        is_list = isinstance(values, list) and len(values) == 3
        if not is_list or not all(isinstance(value, int | float) and value >= lowest for value in values):
            raise ValueError(
                f"{path}: mean {mean!r} and deviation {std!r} of the pixels must each be three numbers, for red, green "
                "and blue"
            )
    return tuple(map(float, mean)), tuple(map(float, std))  # type: ignore[return-value]


def open_tower(folder: Path) -> Weights:
    """The weights of a Hugging Face folder by the names that `weight_map` takes.

    Raises:
        ValueError: as `weight_files.open_folder`.
    """
    return open_folder(folder).renamed(canonical_name)


def plan(config: ConverterConfig, arch: VisionArch, weights: Weights, rows: Sequence[Move | Drop]) -> Conversion:
    """Plan the conversion of a tower.

    Raises:
        ValueError: the weights do not fit.
    """
    tensors, dropped = apply(rows, arch.num_layers, weights, config.dtype)
    return Conversion(
        architecture=Architecture(vision=arch, pictures=default_pictures(arch)),
        tensors=tensors,
        dropped=dropped,
        files=weights.files,
        references=(config.input,),
        notes=notes(arch),
    )


def notes(arch: VisionArch) -> tuple[str, ...]:
    """Lines of the report: what the weights do not tell, and so should be looked at."""
    return (
        f"{arch.num_layers} layers, width {arch.hidden_size}, images of {arch.image_size} pixels in patches of "
        f"{arch.patch_dim}",
        f"{arch.num_attention_heads} heads of {arch.hidden_size // arch.num_attention_heads} channels, "
        f"{arch.activation}, features of layer {arch.feature_layer}",
    )
