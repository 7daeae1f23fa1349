"""How many of the language model's layers each pipeline stage gets.

The first stage also has the vision tower and the projector, the last one the output layer. The slowest stage sets the
pace of all, so layers are dealt out such that it is as fast as can be.

Imports no torch: the command line checks and the planner count with it before anything is up.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmcore.config import ParallelConfig
from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import Architecture

# Of the positions of a sequence, those with a label, which alone reach the output layer.
LABEL_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Multiply-adds of one training step for each position of a sequence, forward and backward."""

    vision: float
    """Vision tower and projector, if pictures fill the sequence."""
    layer: float
    """One layer of the language model."""
    output: float


def step_costs(architecture: Architecture, frozen: Collection[str] = ()) -> Costs:
    """What the parts of a model cost, attention's scores and embedding lookups left out.

    Args:
        architecture: a whole model.
        frozen: parts that are never trained, of `mmcore.constants.MODULES`. A layer's own gradients cost as much as
            its forward pass, and so does the gradient of its input, which the lowest trained part needs no more.
    """
    vision, between, language = architecture.vision, architecture.vision_projection, architecture.language
    assert vision is not None and between is not None and language is not None
    trains = {name: name not in frozen for name in (VISION_MODEL, VISION_PROJECTION, LANGUAGE_MODEL)}
    width = vision.hidden_size
    tower = vision.num_layers_run * (4 * width**2 + 2 * width * vision.ffn_hidden_size)
    middle = between.ffn_hidden_size
    projector = middle * (width + language.hidden_size) if middle else width * language.hidden_size
    heads = 2 * (language.num_attention_heads + language.num_query_groups) * language.kv_channels
    layer = language.hidden_size * (heads + 3 * language.ffn_hidden_size)
    passes = 2 + trains[LANGUAGE_MODEL]  # frozen, it still passes gradients on
    return Costs(
        vision=tower * vision.num_positions / vision.num_image_embeddings * (1 + 2 * trains[VISION_MODEL])
        + projector * (1 + trains[VISION_MODEL] + trains[VISION_PROJECTION]),
        layer=layer * passes,
        output=language.hidden_size * language.padded_vocab_size * LABEL_SHARE * passes,
    )


def split_layers(
    num_layers: int, extra: Sequence[float], layer: float = 1.0, first: int = 0, last: int = 0, least: int = 1
) -> list[int]:
    """Deal layers to stages so that the slowest stage is as fast as can be.

    One layer after the other goes to the stage that is the fastest with it; of equal ones to the last, since the
    earlier a stage, the more micro batches' activations it holds.

    Args:
        num_layers: enough for all stages.
        extra: cost of what else each stage computes.
        layer: cost of one layer.
        first: layers of the first stage; 0 leaves them to the costs.
        last: layers of the last stage, of two or more, likewise.
        least: layers that every stage gets.
    Returns:
        Layers of each stage.
    """
    layers = [least] * len(extra)
    layers[0], layers[-1] = first or layers[0], last or layers[-1]
    dealt_to = range(bool(first), len(extra) - bool(last))
    assert sum(layers) <= num_layers and (dealt_to or sum(layers) == num_layers)
    for _ in range(num_layers - sum(layers)):
        layers[min(dealt_to, key=lambda stage: (extra[stage] + layer * (layers[stage] + 1), -stage))] += 1
    return layers


def plan_layers(architecture: Architecture, parallel: ParallelConfig, frozen: Collection[str] = ()) -> list[int]:
    """The language model's layers on each stage; where stages have several chunks, in each of these from the bottom up.

    Stages are weighed first, since in the long run each computes all its chunks; then the chunks of each.

    Args:
        architecture: a whole model, which `check_layout` has accepted at this layout.
        frozen: parts that are never trained.
    """
    assert architecture.language is not None
    costs, chunks = step_costs(architecture, frozen), parallel.virtual_pipeline_model_parallel_size
    extra = [[0.0] * chunks for _ in range(parallel.pipeline_model_parallel_size)]
    extra[0][0] += costs.vision
    extra[-1][-1] += costs.output
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    weights = [sum(stage) for stage in extra]
    stages = split_layers(architecture.language.num_layers, weights, costs.layer, first, last, chunks)
    dealt = [split_layers(layers, stage, costs.layer) for layers, stage in zip(stages, extra, strict=True)]
    return [stage[chunk] for chunk in range(chunks) for stage in dealt]


def stage_layers(layers: Sequence[int], stages: int) -> list[int]:
    """All layers of each stage, of those of every chunk from the bottom up."""
    return [sum(layers[stage::stages]) for stage in range(stages)]
