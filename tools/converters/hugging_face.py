"""Whole models and single towers as Hugging Face keeps them: which part has which names."""

from dataclasses import dataclass

import decoder
import encoder
import projector
from weight_map import Drop, Move

from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a model."""

    module: str
    """mcore's name: first word of its keys in a checkpoint."""
    prefix: str
    """What stands before the names of its rows."""
    rows: tuple[Move | Drop, ...]
    num_layers: int


def parts(architecture: Architecture) -> tuple[Part, ...]:
    """The parts of a model, named as the hub's llava-hf folders and towers are.

    transformers 5 writes vision towers without "vision_model." and reads them either way; older
    versions and serving engines read these names only.
    """
    vision, between, language = architecture.vision, architecture.vision_projection, architecture.language
    is_whole = between is not None
    found: list[Part] = []
    if vision is not None:
        prefix = "vision_tower.vision_model." if is_whole else "vision_model."
        rows = encoder.weight_map(vision)
        found.append(Part(module=VISION_MODEL, prefix=prefix, rows=rows, num_layers=vision.num_layers))
    if between is not None:
        assert vision is not None and language is not None
        moves = projector.weight_map(between, vision.hidden_size, language.hidden_size, projector.HUGGING_FACE)
        found.append(Part(module=VISION_PROJECTION, prefix="multi_modal_projector.", rows=moves, num_layers=1))
    if language is not None:
        prefix = "language_model." if is_whole else ""
        rows = decoder.weight_map(language)
        found.append(Part(module=LANGUAGE_MODEL, prefix=prefix, rows=rows, num_layers=language.num_layers))
    return tuple(found)
