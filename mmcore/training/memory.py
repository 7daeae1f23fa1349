"""How much memory a rank needs before any activation: weights, gradients, optimizer. Imports no torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mmcore.config import ParallelConfig
from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import Architecture
from mmcore.models.parameters import num_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBytes:
    """Of one rank."""

    weights: int
    """Of all that the rank holds, trained or not, with what is kept of it in FP8."""
    gradients: int
    """Of what is trained; every replica holds all of its part of the model."""
    masters: int
    """What weights lack of float32; dealt to the replicas."""
    moments: int
    """AdamW's two; dealt to the replicas."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments

    def __str__(self) -> str:
        numbers = (self.total, self.weights, self.gradients, self.masters + self.moments)
        whole, *parts = (f"{number / 1e9:.3g}" for number in numbers)
        return f"{whole} GB (weights {parts[0]}, gradients {parts[1]}, optimizer {parts[2]})"


def training_bytes(
    architecture: Architecture,
    frozen: Collection[str],
    parallel: ParallelConfig,
    *,
    data_parallel_size: int,
    layers: Sequence[int],
    precision: Literal["fp32", "bf16"],
    states: Literal["full", "lean"],
    fp8: Collection[str] = (),
) -> list[TrainingBytes]:
    """Of a rank of each pipeline stage.

    Not counted: the buffers' padding, and that norms and some biases are whole on every tensor rank (each below 0.1 %
    of a real model). Counted as trained: vision layers above the one whose features are taken. Beside it lie
    activations, and for moments: in an update, 512 MiB of lean states' parts turned to float32; while a checkpoint is
    copied to the host, two float32 copies of the largest gradient buffer's portion (all of it, without
    --parallel.overlap-grad-reduce).

    Args:
        frozen: parts that are not trained, of `mmcore.constants.MODULES`.
        layers: of the language model on each stage, as `mmcore.models.pipeline.plan_layers` says.
        precision: of the run (`--train.precision`).
        states: of the optimizer (`--optimizer.states`).
        fp8: parts whose layers are computed in FP8: a copy of each weight and one of its transpose.
    """
    weight = 2 if precision == "bf16" else 4
    gradient = 2 if states == "lean" else 4
    master = {"fp32": 0, "bf16": 2 if states == "lean" else 4}[precision]
    moment = 2 if states == "lean" else 4
    found = []
    for parts, own_layers in zip(stage_parameters(architecture, layers), layers, strict=True):
        held = sum(parts.values()) // parallel.tensor_model_parallel_size
        copied = own_layers * _layer(architecture) * (LANGUAGE_MODEL in fp8)
        copied += parts.get(VISION_MODEL, 0) * (VISION_MODEL in fp8)
        trained = sum(count for part, count in parts.items() if part not in frozen)
        trained //= parallel.tensor_model_parallel_size
        own = -(-trained // data_parallel_size)
        found.append(
            TrainingBytes(
                weights=held * weight + 2 * copied // parallel.tensor_model_parallel_size,
                gradients=trained * gradient,
                masters=own * master,
                moments=2 * own * moment,
            )
        )
    return found


def stage_parameters(architecture: Architecture, layers: Sequence[int]) -> list[dict[str, int]]:
    """Parameters of each part on each pipeline stage."""
    whole, language = num_parameters(architecture), architecture.language
    assert language is not None and sum(layers) == language.num_layers
    table = language.padded_vocab_size * language.hidden_size
    is_shared = language.share_embeddings_and_output_weights
    layer = _layer(architecture)
    above = whole[LANGUAGE_MODEL] - language.num_layers * layer - table  # the last norm, and the output layer
    stages = [{LANGUAGE_MODEL: count * layer} for count in layers]
    stages[0] |= {part: count for part, count in whole.items() if part in (VISION_MODEL, VISION_PROJECTION)}
    stages[0][LANGUAGE_MODEL] += table
    stages[-1][LANGUAGE_MODEL] += above + (table if is_shared and len(layers) > 1 else 0)
    return stages


def _layer(architecture: Architecture) -> int:
    """Parameters of one layer of the language model."""
    language = architecture.language
    assert language is not None
    fewer = replace(architecture, language=replace(language, num_layers=language.num_layers - 1))
    return num_parameters(architecture)[LANGUAGE_MODEL] - num_parameters(fewer)[LANGUAGE_MODEL]
