"""Floating-point operations of a training step: the ones that the mathematics needs, and those that are done.

A multiply-add is two. Matrix products alone are counted, as everywhere (norms, activations and rotary embeddings
come to less than one in a hundred). Of each, in this order from pixels to logits:

- forward: always;
- the gradient of its weights: where they are trained;
- the gradient of its input: where anything below is trained.

So a frozen language model above a trained projector costs forward and input gradients, a frozen vision tower its
forward pass alone. Attention looks at the pairs of a sample that its mask lets through (half of them if causal), of
packed samples each by itself; its backward pass costs twice its forward pass. Only positions with a label reach the
MLP of the last layer and the output layer. Padding, of sequences or of the vocabulary, is not counted.

Sources: Narayanan et al., arXiv:2104.04473, for the counts of a layer; Chowdhery et al., arXiv:2204.02311, appendix B,
for utilisation of model FLOPs; Korthikanti et al., arXiv:2205.05198, for that of hardware FLOPs, which also counts
what is computed again. Imports no torch.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import Architecture, LanguageArch, ProjectorArch, VisionArch


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step has to do, over all of its micro batches and replicas."""

    num_images: int
    """Squares that the vision tower sees."""
    num_positions: int
    """Of all samples, image embeddings included."""
    num_pairs: float
    """Of positions that attend to each other, summed over samples; see `causal_pairs`."""
    num_labels: int
    """Positions whose logits are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Of one step, over all ranks."""

    parts: dict[str, float]
    """What the mathematics needs, by part: vision_model, vision_projection, language_model (its layers' matrices),
    attention (its scores), output_layer."""
    recomputed: float
    """Forward passes that are done again in the backward pass."""

    @property
    def model(self) -> float:
        """What the mathematics needs: the numerator of MFU."""
        return sum(self.parts.values())

    @property
    def hardware(self) -> float:
        """What is done: the numerator of HFU."""
        return self.model + self.recomputed


@dataclass(frozen=True, slots=True)
class _Step:
    """One parameter, or attention's scores, on the way from pixels to logits."""

    part: str
    name: str
    """Of the parameter, as the local kernels have it."""
    forward: float = 0.0
    """Of what it is multiplied with; nothing for norms, biases and embeddings, which count for what lies above."""
    kind: Literal["matrix", "mlp", "scores"] = "matrix"


def causal_pairs(length: int, window: int | None = None) -> float:
    """Pairs of positions of a causal sample that attend to each other.

    Args:
        window: positions that one sees, itself included; all before it if None.
    """
    if window is None or window >= length:
        return length**2 / 2
    return length * window - window**2 / 2


def step_flops(
    architecture: Architecture,
    work: Work,
    is_trained: Callable[[str], bool] = lambda name: True,
    recompute: str = "none",
) -> Flops:
    """Count a step.

    Args:
        architecture: a whole model.
        is_trained: whether a parameter is, by its name in the whole model.
        recompute: a key of `mmcore.models.recompute.RECOMPUTE`.
    """
    vision, between, language = architecture.vision, architecture.vision_projection, architecture.language
    assert vision is not None and between is not None and language is not None
    steps = itertools.chain(
        _vision(vision, work.num_images),
        _projector(between, vision.hidden_size, language.hidden_size, work.num_images * vision.num_image_embeddings),
        _language(language, work),
    )
    again = {"none": (), "selective": ("mlp",), "full": ("matrix", "mlp", "scores")}[recompute]
    parts: dict[str, float] = {}
    recomputed, is_below = 0.0, False
    for step in steps:
        is_own = step.kind != "scores" and is_trained(step.name)
        times = 1 + 2 * is_below if step.kind == "scores" else 1 + is_own + is_below
        is_below = is_below or is_own
        parts[step.part] = parts.get(step.part, 0.0) + step.forward * times
        if is_below and step.kind in again and ".layers." in step.name:
            recomputed += step.forward
    return Flops(parts=parts, recomputed=recomputed)


def _vision(arch: VisionArch, num_images: int) -> Iterator[_Step]:
    hidden, positions = arch.hidden_size, num_images * arch.num_positions
    pixels = 3 * arch.patch_dim**2
    yield _Step(VISION_MODEL, "vision_model.conv1.weight", 2 * num_images * arch.num_patches * pixels * hidden)
    for name in ("conv1.bias", "class_token", "position_embeddings.weight", "ln_pre.weight", "ln_pre.bias"):
        yield _Step(VISION_MODEL, f"vision_model.{name}")
    yield from _layers(
        VISION_MODEL,
        "vision_model.decoder.layers",
        arch.num_layers_run,
        positions,
        qkv=hidden * 3 * hidden,
        proj=hidden * hidden,
        fc1=hidden * arch.ffn_hidden_size,
        fc2=hidden * arch.ffn_hidden_size,
        scores=(VISION_MODEL, 4 * num_images * arch.num_positions**2 * hidden),
    )


def _projector(arch: ProjectorArch, wide: int, out: int, positions: int) -> Iterator[_Step]:
    middle, encoder = arch.ffn_hidden_size, "vision_projection.encoder"
    shapes = {".linear_fc1": (wide, middle), ".linear_fc2": (middle, out)} if middle else {"": (wide, out)}
    for name, (rows, columns) in shapes.items():
        yield _Step(VISION_PROJECTION, f"{encoder}{name}.weight", 2 * positions * rows * columns)
        yield _Step(VISION_PROJECTION, f"{encoder}{name}.bias")
    yield _Step(VISION_PROJECTION, "vision_projection.image_newline")


def _language(arch: LanguageArch, work: Work) -> Iterator[_Step]:
    hidden, heads = arch.hidden_size, arch.num_attention_heads * arch.kv_channels
    yield _Step(LANGUAGE_MODEL, "language_model.embedding.word_embeddings.weight")
    yield from _layers(
        LANGUAGE_MODEL,
        "language_model.decoder.layers",
        arch.num_layers,
        work.num_positions,
        qkv=hidden * (heads + 2 * arch.num_query_groups * arch.kv_channels),
        proj=hidden * heads,
        fc1=hidden * 2 * arch.ffn_hidden_size,
        fc2=hidden * arch.ffn_hidden_size,
        scores=("attention", 4 * work.num_pairs * heads),
        read=work.num_labels,
    )
    yield _Step(LANGUAGE_MODEL, "language_model.decoder.final_layernorm.weight")
    table = "embedding.word_embeddings" if arch.share_embeddings_and_output_weights else "output_layer"
    yield _Step("output_layer", f"language_model.{table}.weight", 2 * work.num_labels * hidden * arch.vocab_size)


def _layers(
    part: str,
    stack: str,
    num_layers: int,
    positions: int,
    *,
    scores: tuple[str, float],
    read: int | None = None,
    **weights: int,
) -> Iterator[_Step]:
    """Transformer layers.

    Args:
        scores: part and operations of one layer's attention.
        read: positions that reach the last layer's MLP; all if None.
        weights: entries of its matrices.
    """

    def matrix(layer: str, name: str, kind: Literal["matrix", "mlp"]) -> Iterator[_Step]:
        entries = weights[name.rpartition("_")[2]]
        is_last = kind == "mlp" and layer == f"{stack}.{num_layers - 1}"
        seen = positions if read is None or not is_last else read
        yield _Step(part, f"{layer}.{name}.weight", 2 * seen * entries, kind)
        yield _Step(part, f"{layer}.{name}.bias")

    for index in range(num_layers):
        layer = f"{stack}.{index}"
        yield from (_Step(part, f"{layer}.input_layernorm.{name}") for name in ("weight", "bias"))
        yield from matrix(layer, "self_attention.linear_qkv", "matrix")
        yield _Step(scores[0], f"{layer}.self_attention.core_attention", scores[1], "scores")
        yield from matrix(layer, "self_attention.linear_proj", "matrix")
        yield from (_Step(part, f"{layer}.pre_mlp_layernorm.{name}") for name in ("weight", "bias"))
        yield from matrix(layer, "mlp.linear_fc1", "mlp")
        yield from matrix(layer, "mlp.linear_fc2", "mlp")
