"""Convert the vision tower of a CLIP: OpenAI's, open_clip's or Hugging Face's.

`python tools/converters/clip.py --input ViT-L-14-336px.pt --output vision`

Takes OpenAI's archive, a state dict (.pt, .bin, .safetensors), a folder of open_clip's with
open_clip_config.json, or Hugging Face's folder of a CLIPModel or a CLIPVisionModel. What leaves no
trace in the tensors (heads, activation) is read from the configuration beside them, known of OpenAI's,
and else asked for.
"""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import encoder
from command_line import run
from conversion import Conversion, ConverterConfig, carry_out
from decoder import number
from layout import as_token, group_stacked_qkv
from weight_files import Weights, open_file, read_json
from weight_map import Drop, Move

from mmcore.constants import VISION_MODEL
from mmcore.models.architecture import VisionArch

Source = tuple[VisionArch, Weights, tuple[Move | Drop, ...]]
"""A tower: what it is, its weights, and their map."""

HUGGING_FACE_CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# Fields of open_clip's vision_cfg that make another network of it (open_clip/model.py CLIPVisionCfg).
OPEN_CLIP_UNSUPPORTED = (
    *("timm_model_name", "ls_init_value", "no_ln_pre", "act_kwargs", "block_type", "qk_norm", "scaled_cosine_attn"),
    *("scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
)

# Channels of a head by the tower's width where they are not 64 (open_clip's model_configs: H, g, bigG, e).
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig(ConverterConfig):
    """Convert the vision tower of a CLIP: OpenAI's, open_clip's or Hugging Face's."""

    num_attention_heads: int = 0
    """Attention heads; 0 takes them from the configuration, or from the width of a head."""
    head_width: int = 0
    """Channels of one attention head; 0 is the convention: 64, in towers 1280 or wider what open_clip has there."""
    activation: Literal["", "quick_gelu", "gelu"] = ""
    """Needed where nothing tells it: OpenAI's towers use quick_gelu, most that open_clip trained use gelu."""
    feature_layer: int = -2
    """Hidden state that feeds the projector: -1 is the last layer's, -2 the one before it (LLaVA-1.5)."""


def weight_map(arch: VisionArch) -> tuple[Move | Drop, ...]:
    """From OpenAI's and open_clip's names, which are the same.

    Source: openai/CLIP clip/model.py VisionTransformer; open_clip/transformer.py VisionTransformer.
    """
    h, f, p = arch.hidden_size, arch.ffn_hidden_size, arch.patch_dim
    block, layers = "visual.transformer.resblocks.{}.", f"{VISION_MODEL}.decoder.layers."
    qkv = group_stacked_qkv(arch.num_attention_heads)
    return (
        Move(f"{VISION_MODEL}.class_token", {"visual.class_embedding": (h,)}, as_token),
        # Row 0 is the class token's on both sides. Fixed (sin_cos_2d) embeddings are stored like learnt ones.
        Move(f"{VISION_MODEL}.position_embeddings.weight", {"visual.positional_embedding": (arch.num_positions, h)}),
        Move(f"{VISION_MODEL}.conv1.weight", {"visual.conv1.weight": (h, 3, p, p)}),
        Move(f"{VISION_MODEL}.ln_pre.weight", {"visual.ln_pre.weight": (h,)}),
        Move(f"{VISION_MODEL}.ln_pre.bias", {"visual.ln_pre.bias": (h,)}),
        Move(f"{layers}self_attention.linear_qkv.layer_norm_weight", {f"{block}ln_1.weight": (h,)}),
        Move(f"{layers}self_attention.linear_qkv.layer_norm_bias", {f"{block}ln_1.bias": (h,)}),
        Move(f"{layers}self_attention.linear_qkv.weight", {f"{block}attn.in_proj_weight": (3 * h, h)}, qkv),
        Move(f"{layers}self_attention.linear_qkv.bias", {f"{block}attn.in_proj_bias": (3 * h,)}, qkv),
        Move(f"{layers}self_attention.linear_proj.weight", {f"{block}attn.out_proj.weight": (h, h)}),
        Move(f"{layers}self_attention.linear_proj.bias", {f"{block}attn.out_proj.bias": (h,)}),
        Move(f"{layers}mlp.linear_fc1.layer_norm_weight", {f"{block}ln_2.weight": (h,)}),
        Move(f"{layers}mlp.linear_fc1.layer_norm_bias", {f"{block}ln_2.bias": (h,)}),
        Move(f"{layers}mlp.linear_fc1.weight", {f"{block}mlp.c_fc.weight": (f, h)}),
        Move(f"{layers}mlp.linear_fc1.bias", {f"{block}mlp.c_fc.bias": (f,)}),
        Move(f"{layers}mlp.linear_fc2.weight", {f"{block}mlp.c_proj.weight": (h, f)}),
        Move(f"{layers}mlp.linear_fc2.bias", {f"{block}mlp.c_proj.bias": (h,)}),
        Move(f"{VISION_MODEL}.ln_post.weight", {"visual.ln_post.weight": (h,)}),
        Move(f"{VISION_MODEL}.ln_post.bias", {"visual.ln_post.bias": (h,)}),
        *(Drop(pattern, "contrastive head: features are taken before it") for pattern in HEAD),
        *(Drop(pattern, "text tower: the language model takes its place") for pattern in TEXT_TOWER),
        *(Drop(name, "sizes of the whole model, which the shapes tell as well") for name in SIZES),
    )


HEAD = ("visual.proj", "logit_scale", "logit_bias")
TEXT_TOWER = (
    "transformer.*",
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.*",
    "text_projection",
    "text_projection.*",
    "cls_emb",
    "attn_mask",
    "text.*",
)
SIZES = ("input_resolution", "context_length", "vocab_size")


def read_architecture(weights: Weights, config: ClipConfig) -> VisionArch:
    """The architecture that the tensors' shapes and the options describe.

    Raises:
        ValueError: not a CLIP vision transformer, or an option contradicts the shapes or is missing.
    """
    conv = _shape(weights, "visual.conv1.weight", 4, "[width, 3, patch, patch]")
    positions = _shape(weights, "visual.positional_embedding", 2, "[patches + 1, width]")
    ffn = _shape(weights, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2, "[ffn width, width]")
    hidden, patch = conv[0], conv[-1]
    grid = round((positions[0] - 1) ** 0.5)
    if grid < 1 or grid * grid + 1 != positions[0]:
        raise ValueError(
            f"{weights.name}: visual.positional_embedding has {positions[0]} rows, which are not those of a class "
            "token and a square of patches; only square images are supported"
        )
    numbers = {
        match[1] for name in weights.headers if (match := re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name))
    }
    # Only OpenAI's archives hold the sizes beside the weights, and all of OpenAI's have quick_gelu.
    activation = config.activation or ("quick_gelu" if weights.headers.keys() >= set(SIZES) else "")
    if not activation:
        raise ValueError(
            f"{weights.name}: the weights do not tell their activation, and a wrong one answers nonsense: give "
            "--activation quick_gelu for OpenAI's weights and open_clip's models named -quickgelu, else gelu"
        )
    return VisionArch(
        num_layers=len(numbers),
        hidden_size=hidden,
        ffn_hidden_size=ffn[0],
        num_attention_heads=_num_attention_heads(hidden, config),
        image_size=grid * patch,
        patch_dim=patch,
        activation=activation,
        feature_layer=config.feature_layer,
    )


def _shape(weights: Weights, name: str, rank: int, meaning: str) -> tuple[int, ...]:
    header = weights.headers.get(name)
    if header is None or len(header.shape) != rank:
        found = "no such tensor" if header is None else list(header.shape)
        raise ValueError(
            f"{weights.name} does not hold the vision transformer of OpenAI's CLIP or of open_clip: {name} should be "
            f"{meaning}, found {found}"
        )
    return header.shape


def _num_attention_heads(hidden: int, config: ClipConfig) -> int:
    heads, width = config.num_attention_heads, config.head_width
    if min(heads, width) < 0:
        raise ValueError(f"--num-attention-heads {heads} and --head-width {width} must not be negative")
    if heads and width and heads * width != hidden:
        raise ValueError(f"--num-attention-heads {heads} x --head-width {width} is not the tower's width {hidden}")
    if heads:
        if hidden % heads:
            raise ValueError(f"--num-attention-heads {heads} does not divide the tower's width {hidden}")
        return heads
    width = width or HEAD_WIDTHS.get(hidden, 64)
    if hidden % width:
        raise ValueError(
            f"heads of {width} channels do not divide the tower's width {hidden}: give --head-width, or "
            "--num-attention-heads"
        )
    return hidden // width


def _hugging_face(config: ClipConfig) -> Source:
    path = config.input / HUGGING_FACE_CONFIG
    arch = encoder.read_architecture(read_json(path), path, encoder.CLIP, config.feature_layer)
    _check_options(config, arch, path)
    return arch, encoder.open_tower(config.input), encoder.weight_map(arch)


def _open_clip(config: ClipConfig) -> Source:
    path = config.input / OPEN_CLIP_CONFIG
    content = read_json(path)
    model: Any = content.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(vision, dict):
        raise ValueError(f"{path} has no model_cfg.vision_cfg: it does not describe a model of open_clip")
    _refuse_other_networks(vision, path)
    found = [config.input / name for name in OPEN_CLIP_WEIGHTS if (config.input / name).is_file()]
    if not found:
        raise ValueError(f"{config.input} holds {OPEN_CLIP_CONFIG} but none of {', '.join(OPEN_CLIP_WEIGHTS)}")
    weights = open_file(found[0])
    known = replace(
        config,
        num_attention_heads=0,
        head_width=number({"head_width": 64, **vision}, path, "head_width"),
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
    )
    epsilon = number({"eps": 1e-5, **(vision.get("norm_kwargs") or {})}, path, "eps", float)
    arch = replace(read_architecture(weights, known), layernorm_epsilon=epsilon)
    _check_sizes(vision, arch, path)
    _check_options(config, arch, path)
    preprocess = content.get("preprocess_cfg")
    if isinstance(preprocess, dict) and {"mean", "std"} <= preprocess.keys():
        mean, std = encoder.pixel_statistics(preprocess["mean"], preprocess["std"], path)
        arch = replace(arch, image_mean=mean, image_std=std)
    return arch, weights, weight_map(arch)


def _file(config: ClipConfig) -> Source:
    weights = open_file(config.input)
    arch = read_architecture(weights, config)
    return arch, weights, weight_map(arch)


def _refuse_other_networks(vision: dict[str, Any], path: Path) -> None:
    other = [f"{name} {vision[name]!r}" for name in OPEN_CLIP_UNSUPPORTED if vision.get(name)]
    if isinstance(vision.get("layers"), list):
        other.append(f"layers {vision['layers']} of a ResNet")
    if set(vision.get("norm_kwargs") or {}) - {"eps"}:
        other.append(f"norm_kwargs {vision['norm_kwargs']}")
    if other:
        raise ValueError(
            f"{path} describes another network than CLIP's vision transformer ({', '.join(other)}), which is not "
            "supported; SigLIP towers are taken from their Hugging Face folders by siglip.py"
        )


def _check_sizes(vision: dict[str, Any], arch: VisionArch, path: Path) -> None:
    found = {
        "layers": arch.num_layers,
        "width": arch.hidden_size,
        "patch_size": arch.patch_dim,
        "image_size": arch.image_size,
    }
    differing = [
        f"{name} is {vision[name]}, the weights have {size}"
        for name, size in found.items()
        if name in vision and vision[name] not in (size, [size, size])
    ]
    if differing:
        raise ValueError(
            f"{path} and the weights beside it disagree ({'; '.join(differing)}): they are of two models, or incomplete"
        )


def _check_options(config: ClipConfig, arch: VisionArch, path: Path) -> None:
    told = {
        "num_attention_heads": arch.num_attention_heads,
        "head_width": arch.hidden_size // arch.num_attention_heads,
        "activation": arch.activation,
    }
    asked = {name: getattr(config, name) for name in told}
    differing = [
        f"--{name.replace('_', '-')} {asked[name]} but it says {value}"
        for name, value in told.items()
        if asked[name] and asked[name] != value
    ]
    if differing:
        raise ValueError(f"{path} contradicts the options ({', '.join(differing)}): leave them out")


def plan(config: ClipConfig) -> Conversion:
    """Plan the conversion.

    Raises:
        ValueError: the input does not fit.
    """
    folder = config.input
    # timm's folders have a config.json of timm's own beside open_clip's.
    if (folder / HUGGING_FACE_CONFIG).is_file() and "model_type" in read_json(folder / HUGGING_FACE_CONFIG):
        source = _hugging_face(config)
    elif (folder / OPEN_CLIP_CONFIG).is_file():
        source = _open_clip(config)
    elif folder.is_dir():
        raise ValueError(
            f"--input {folder} has neither {HUGGING_FACE_CONFIG} with a model_type nor {OPEN_CLIP_CONFIG}: name the "
            "file of weights"
        )
    else:
        source = _file(config)
    return encoder.plan(config, *source)


def convert(config: ClipConfig) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    return carry_out(config, plan(config), config.input)


if __name__ == "__main__":
    sys.exit(run(ClipConfig, convert))
