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
from typing import Any, Literal

import encoder
from command_line import run
from conversion import Conversion, ConverterConfig, carry_out
from layout import as_token, group_stacked_qkv
from weight_files import Weights, open_file, open_folder, read_json
from weight_map import Drop, Move, apply

from mmcore.constants import VISION_MODEL
from mmcore.models.architecture import Architecture, VisionArch

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


def _open_clip(config: ClipConfig) -> tuple[Weights, ClipConfig]:
    """A folder of open_clip's, whose configuration stands in for the options that were not given."""
    path = config.input / "open_clip_config.json"
    model: Any = read_json(path).get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(vision, dict) or "layers" not in vision:
        raise ValueError(f"{path} has no model_cfg.vision_cfg of a vision transformer")
    known = {
        "activation": config.activation or ("quick_gelu" if model.get("quick_gelu") else "gelu"),
        "head_width": config.head_width or (0 if config.num_attention_heads else int(vision.get("head_width", 64))),
    }
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"):
        if (config.input / name).is_file():
            return open_file(config.input / name), replace(config, **known)
    raise ValueError(f"{config.input} holds open_clip_config.json but no open_clip_model.safetensors and no .bin")


def plan(config: ClipConfig) -> Conversion:
    """Plan the conversion.

    Raises:
        ValueError: the input does not fit.
    """
    if (config.input / "config.json").is_file():
        path = config.input / "config.json"
        arch = encoder.read_architecture(read_json(path), path, encoder.CLIP, config.feature_layer)
        asked = (config.num_attention_heads or arch.num_attention_heads, config.activation or arch.activation)
        if asked != (arch.num_attention_heads, arch.activation):
            raise ValueError(
                f"{path} says {arch.num_attention_heads} heads and {arch.activation}, the options {asked[0]} and "
                f"{asked[1]}: leave them out"
            )
        weights = open_folder(config.input).renamed(encoder.canonical_name)
        rows = encoder.weight_map(arch)
    elif config.input.is_dir():
        if not (config.input / "open_clip_config.json").is_file():
            raise ValueError(
                f"--input {config.input} has neither config.json nor open_clip_config.json: name the file of weights"
            )
        weights, known = _open_clip(config)
        arch = read_architecture(weights, known)
        rows = weight_map(arch)
    else:
        weights = open_file(config.input)
        arch = read_architecture(weights, config)
        rows = weight_map(arch)
    tensors, dropped = apply(rows, arch.num_layers, weights, config.dtype)
    return Conversion(
        architecture=Architecture(vision=arch),
        tensors=tensors,
        dropped=dropped,
        files=weights.files,
        references=(config.input,),
        notes=encoder.notes(arch),
    )


def convert(config: ClipConfig) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    return carry_out(config, plan(config), config.input)


if __name__ == "__main__":
    sys.exit(run(ClipConfig, convert))
