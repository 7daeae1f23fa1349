"""Projectors: those that LLaVA and Hugging Face keep, and new ones."""

import re
from functools import partial

import torch
from checkpoint_folder import StoredTensor
from torch import Tensor
from weight_files import Weights
from weight_map import Move

from mmcore.constants import VISION_PROJECTION
from mmcore.models.architecture import ProjectorArch

# Names of the layers: the original LLaVA's torch.nn.Sequential or its one layer, and Hugging Face's.
LLAVA: dict[str, tuple[str, ...]] = {"mlp": ("0.", "2."), "affine": ("",)}
HUGGING_FACE: dict[str, tuple[str, ...]] = {"mlp": ("linear_1.", "linear_2.")}


NEWLINE = f"{VISION_PROJECTION}.image_newline"


def layers(arch: ProjectorArch, vision_hidden: int, language_hidden: int) -> dict[str, tuple[int, int]]:
    """mcore's layers, by name: rows and columns of their weights."""
    if arch.projector_type == "affine":
        return {"encoder": (language_hidden, vision_hidden)}
    width = arch.ffn_hidden_size
    return {"encoder.linear_fc1": (width, vision_hidden), "encoder.linear_fc2": (language_hidden, width)}


def weight_map(
    arch: ProjectorArch,
    vision_hidden: int,
    language_hidden: int,
    names: dict[str, tuple[str, ...]],
    newline: str = "",
) -> tuple[Move, ...]:
    """From the names that another library gives the layers.

    Args:
        newline: name of the embedding that ends a row of tiles, which others keep beside the projector; none if empty.
    Source: haotian-liu/LLaVA multimodal_projector/builder.py; transformers models/llava/modeling_llava.py.
    """
    rows: list[Move] = []
    sizes = layers(arch, vision_hidden, language_hidden)
    for name, (layer, shape) in zip(names[arch.projector_type], sizes.items(), strict=True):
        rows.append(Move(f"{VISION_PROJECTION}.{layer}.weight", {f"{name}weight": shape}))
        if arch.add_bias_linear:
            rows.append(Move(f"{VISION_PROJECTION}.{layer}.bias", {f"{name}bias": shape[:1]}))
    if newline:
        rows.append(Move(NEWLINE, {newline: (language_hidden,)}))
    return tuple(rows)


def canonical_name(name: str) -> str | None:
    """A tensor of LLaVA's mm_projector by the name that it has in the projector alone; None for all others."""
    match = re.fullmatch(r"(?:.*\.)?mm_projector\.(.+)", name)
    return match[1] if match else None


def read_architecture(weights: Weights) -> ProjectorArch:
    """The architecture of an original LLaVA's projector, from its shapes.

    Args:
        weights: by `canonical_name`.
    Raises:
        ValueError: none of the projectors that are known: one linear layer, or two with GELU between.
    """
    names = set(weights.headers)
    has_bias = any(name.endswith("bias") for name in names)
    if {name.removesuffix("weight").removesuffix("bias") for name in names} == {""}:
        return ProjectorArch(projector_type="affine", add_bias_linear=has_bias)
    if {name.removesuffix("weight").removesuffix("bias") for name in names} == {"0.", "2."} and "0.weight" in names:
        return ProjectorArch(ffn_hidden_size=weights.headers["0.weight"].shape[0], add_bias_linear=has_bias)
    raise ValueError(
        f"{weights.name}: its mm_projector has {', '.join(sorted(names)) or 'no tensors'}; known are one linear layer "
        "and mlp2x_gelu"
    )


def initial_projector(
    arch: ProjectorArch, vision_hidden: int, language_hidden: int, seed: int
) -> dict[str, StoredTensor]:
    """Random weights, float32, the same for the same seed.

    Each layer's weight and bias are uniform within 1 / sqrt(inputs), which is torch's default for
    nn.Linear and what LLaVA leaves its projector at.

    Source: torch/nn/modules/linear.py reset_parameters; haotian-liu/LLaVA multimodal_projector/builder.py.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, StoredTensor] = {}
    for layer, (rows, inputs) in layers(arch, vision_hidden, language_hidden).items():
        for name, shape in (("weight", (rows, inputs)), ("bias", (rows,)))[: 2 if arch.add_bias_linear else 1]:
            values = torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            tensors[f"{VISION_PROJECTION}.{layer}.{name}"] = _stored(values, seed)
    return tensors


def initial_newline(language_hidden: int, seed: int) -> dict[str, StoredTensor]:
    """A random embedding that ends a row of tiles, float32, the same for the same seed.

    Source: LLaVA-NeXT llava/model/llava_arch.py: normal, of deviation 1 / sqrt(width).
    """
    values = torch.randn(language_hidden, generator=torch.Generator().manual_seed(seed))
    return {NEWLINE: _stored(values * language_hidden**-0.5, seed)}


def _stored(values: Tensor, seed: int) -> StoredTensor:
    return StoredTensor(
        shape=tuple(values.shape),
        dtype=values.dtype,
        chunks=(partial(_known, values),),
        is_stacked=False,
        origins=(f"random, seed {seed}",),
    )


def _known(values: Tensor) -> Tensor:
    return values
