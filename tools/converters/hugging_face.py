"""Whole models and single towers as Hugging Face keeps them: which part has which names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import decoder
import encoder
import projector
from checkpoint_folder import StoredTensor
from weight_files import Weights
from weight_map import DifferencesError, Drop, Dtype, Move, apply

from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import Architecture

# What transformers 5 calls a whole model's parts in memory, and the hub's folders do; the first that fits.
_HUB_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


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


def canonical_name(name: str) -> str:
    """A whole model's tensor by the name that `parts` gives it, whichever version of transformers wrote it."""
    for old, new in _HUB_PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    tower = "vision_tower."
    if name.startswith(tower):
        name = f"{tower}vision_model.{encoder.canonical_name(name.removeprefix(tower))}"
    return name


def apply_parts(
    parts: Sequence[Part], weights: Weights, dtype: Dtype = "keep"
) -> tuple[dict[str, StoredTensor], Counter[str]]:
    """`weight_map.apply` for a whole model: each part takes the tensors under its prefix, the longest that fits.

    Raises:
        DifferencesError: those of all parts at once, and the tensors of none.
    """
    owners = {name: _owner(parts, name) for name in weights.headers}
    problems = [f"unknown: {name} {list(weights.headers[name].shape)}" for name in owners if owners[name] is None]
    tensors: dict[str, StoredTensor] = {}
    dropped: Counter[str] = Counter()
    for part in parts:
        own = _owned(weights, owners, part)
        try:
            stored, left_out = apply([_prefixed(row, part.prefix) for row in part.rows], part.num_layers, own, dtype)
        except DifferencesError as error:
            problems += error.problems
            continue
        tensors |= stored
        dropped += left_out
    if problems:
        raise DifferencesError(problems, weights.name)
    return tensors, dropped


def _owner(parts: Sequence[Part], name: str) -> Part | None:
    return max(
        (part for part in parts if name.startswith(part.prefix)), key=lambda part: len(part.prefix), default=None
    )


def _owned(weights: Weights, owners: dict[str, Part | None], part: Part) -> Weights:
    return weights.renamed(lambda name: name if owners[name] is part else None)


def _prefixed(row: Move | Drop, prefix: str) -> Move | Drop:
    if isinstance(row, Drop):
        return replace(row, pattern=prefix + row.pattern)
    return replace(row, sources={prefix + name: shape for name, shape in row.sources.items()})
