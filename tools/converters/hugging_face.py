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

NEWLINE = "image_newline"

# What transformers 5 calls a whole model's parts in memory, and the hub's folders do; the first that fits.
_HUB_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
    f"model.{NEWLINE}": NEWLINE,
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
    beside: tuple[str, ...] = ()
    """Names of its rows that are whole without the prefix."""

    def full_name(self, name: str) -> str:
        """Of a tensor in the whole model, by the name in `rows`."""
        return name if name in self.beside else self.prefix + name


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
        found.append(projector_part(architecture, "multi_modal_projector.", projector.HUGGING_FACE, NEWLINE))
    if language is not None:
        prefix = "language_model." if is_whole else ""
        rows = decoder.weight_map(language)
        found.append(Part(module=LANGUAGE_MODEL, prefix=prefix, rows=rows, num_layers=language.num_layers))
    return tuple(found)


def projector_part(architecture: Architecture, prefix: str, names: dict[str, tuple[str, ...]], newline: str) -> Part:
    """The projector of a whole model.

    Args:
        prefix, names: what another library calls its layers.
        newline: what it calls the embedding that ends a row of tiles, where the model has one.
    """
    vision, between, language = architecture.vision, architecture.vision_projection, architecture.language
    assert vision is not None and between is not None and language is not None
    newline = newline if architecture.pictures.has_newline else ""
    rows = projector.weight_map(between, vision.hidden_size, language.hidden_size, names, newline)
    return Part(module=VISION_PROJECTION, prefix=prefix, rows=rows, num_layers=1, beside=(newline,) if newline else ())


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
            stored, left_out = apply([_prefixed(row, part) for row in part.rows], part.num_layers, own, dtype)
        except DifferencesError as error:
            problems += error.problems
            continue
        tensors |= stored
        dropped += left_out
    if problems:
        raise DifferencesError(problems, weights.name)
    return tensors, dropped


def _owner(parts: Sequence[Part], name: str) -> Part | None:
    for part in parts:
        if name in part.beside:
            return part
    return max(
        (part for part in parts if name.startswith(part.prefix)), key=lambda part: len(part.prefix), default=None
    )


def _owned(weights: Weights, owners: dict[str, Part | None], part: Part) -> Weights:
    return weights.renamed(lambda name: name if owners[name] is part else None)


def _prefixed(row: Move | Drop, part: Part) -> Move | Drop:
    if isinstance(row, Drop):
        return replace(row, pattern=part.prefix + row.pattern)
    return replace(row, sources={part.full_name(name): shape for name, shape in row.sources.items()})
