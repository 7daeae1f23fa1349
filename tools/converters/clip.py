"""Convert the vision tower of OpenAI's CLIP or of an open_clip model.

`python tools/converters/clip.py --input ViT-L-14-336px.pt --output vision`

Takes OpenAI's archive, or a state dict (.pt, .bin, .safetensors). The architecture is read off the
tensors' shapes, except what leaves no trace in them: heads, activation, and whose features are used.
"""

import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from checkpoint_folder import new_folder, write_checkpoint
from command_line import run, summary
from layout import as_token, group_stacked_qkv
from weight_files import Weights, open_file
from weight_map import Drop, Move, apply

from mmcore.constants import VISION_MODEL
from mmcore.models.presets import Architecture, VisionArch, save_architecture

# Channels of a head by the tower's width where they are not 64 (open_clip's model_configs: H, g, bigG, e).
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Convert the vision tower of OpenAI's CLIP or of an open_clip model."""

    input: Path
    """OpenAI's .pt, or a state dict as .pt, .bin or .safetensors."""
    output: Path
    """Folder to write: model.json and a distributed checkpoint."""
    num_attention_heads: int = 0
    """Attention heads; 0 takes them from the width of a head."""
    head_width: int = 0
    """Channels of one attention head; 0 is the convention: 64, in towers 1280 or wider what open_clip has there."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """OpenAI's towers use quick_gelu, most that open_clip trained use gelu; the weights do not tell."""
    feature_layer: int = -2
    """Hidden state that feeds the projector: -1 is the last layer's, -2 the one before it (LLaVA-1.5)."""
    overwrite: bool = False
    """Replace a checkpoint that is at the output."""


def weight_map(arch: VisionArch) -> tuple[Move | Drop, ...]:
    """From OpenAI's and open_clip's names, which are the same.

    Source: openai/CLIP clip/model.py VisionTransformer; open_clip/transformer.py VisionTransformer.
    """
    h, f, p = arch.hidden_size, arch.ffn_hidden_size, arch.patch_dim
    block, layers = "visual.transformer.resblocks.{}.", f"{VISION_MODEL}.decoder.layers."
    qkv = partial(group_stacked_qkv, num_attention_heads=arch.num_attention_heads)
    return (
        Move(f"{VISION_MODEL}.class_token", {"visual.class_embedding": (h,)}, as_token),
        # Row 0 is the class token's on both sides. Fixed (sin_cos_2d) embeddings are stored like learnt ones.
        Move(f"{VISION_MODEL}.position_embeddings.weight", {"visual.positional_embedding": (arch.num_patches + 1, h)}),
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
        *(Drop(pattern, "contrastive head: features are taken before it") for pattern in HEAD),
        *(Drop(pattern, "text tower: the language model takes its place") for pattern in TEXT_TOWER),
        *(Drop(name, "sizes of the whole model, which the shapes tell as well") for name in SIZES),
    )


HEAD = ("visual.ln_post.*", "visual.proj", "logit_scale", "logit_bias")
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
        ValueError: not a CLIP vision transformer, or an option contradicts the shapes.
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
    return VisionArch(
        num_layers=len(numbers),
        hidden_size=hidden,
        ffn_hidden_size=ffn[0],
        num_attention_heads=_num_attention_heads(hidden, config),
        image_size=grid * patch,
        patch_dim=patch,
        activation=config.activation,
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


def convert(config: ClipConfig) -> list[str]:
    """Write the checkpoint.

    Returns:
        Lines that tell what was done.
    Raises:
        ValueError: the input does not fit, or the output is taken.
    """
    if config.input.is_dir():
        raise ValueError(f"--input {config.input} is a folder: name the file of weights in it")
    weights = open_file(config.input)
    arch = read_architecture(weights, config)
    tensors, dropped = apply(weight_map(arch), arch.num_layers, weights)
    with new_folder(config.output, config.overwrite, config.input) as folder:
        write_checkpoint(folder, tensors)
        save_architecture(Architecture(vision=arch, sources=weights.sources()), folder)
    return [
        *summary(config.output, tensors, dropped),
        f"  {arch.num_layers} layers, width {arch.hidden_size}, images of {arch.image_size} pixels in patches of "
        f"{arch.patch_dim}",
        f"  taken as: {arch.num_attention_heads} heads of {arch.hidden_size // arch.num_attention_heads} channels, "
        f"{arch.activation}, features of layer {arch.feature_layer} (options change them; the weights do not tell)",
    ]


if __name__ == "__main__":
    sys.exit(run(ClipConfig, convert))
