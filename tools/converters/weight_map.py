"""Weight maps: which source tensors make which tensor of megatron-core, strict both ways.

A map is a tuple of rows. A source tensor that no row names, one that a row names and the source lacks,
and one of another shape than the architecture's are errors, all of them told at once.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial, reduce

import torch
from checkpoint_folder import StoredTensor
from layout import keep
from torch import Tensor
from weight_files import Weights

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Move:
    """Make one of mcore's tensors from one or more of the source's.

    A "{}" in the sources' names is the number of the layer; mcore keeps all layers in one tensor,
    stacked on a new first axis.
    """

    target: str
    sources: dict[str, tuple[int, ...]]
    """Names and the shapes they must have, in the order in which `layout` takes them."""
    layout: Callable[..., Tensor] = keep

    @property
    def is_stacked(self) -> bool:
        return any("{}" in name for name in self.sources)


@dataclass(frozen=True, slots=True)
class Drop:
    """Leave source tensors out on purpose."""

    pattern: str
    """Their names; * stands for anything."""
    reason: str


def apply(
    rows: Sequence[Move | Drop], num_layers: int, weights: Weights
) -> tuple[dict[str, StoredTensor], Counter[str]]:
    """Check the source against the map and plan the conversion; reads no weights.

    Tensors keep the dtype they have. Where one tensor is made of several dtypes it gets the narrowest
    that holds them all, so nothing is rounded.

    Returns:
        mcore's tensors by name, and how many source tensors each reason left out.
    Raises:
        ValueError: unknown or missing tensors, wrong shapes, dtypes that are not floating point.
    """
    problems: list[str] = []
    stored: dict[str, StoredTensor] = {}
    used: set[str] = set()
    for row in rows:
        if isinstance(row, Drop):
            continue
        layers = range(num_layers) if row.is_stacked else range(1)
        chunks = [[name.replace("{}", str(layer)) for name in row.sources] for layer in layers]
        for names in chunks:
            assert used.isdisjoint(names) and row.target not in stored, f"two rows for {row.target}"
            used.update(names)
            for name, shape in zip(names, row.sources.values(), strict=True):
                problems += _problems(name, shape, weights)
        if problems:
            continue
        dtype = reduce(torch.promote_types, (weights.headers[name].dtype for names in chunks for name in names))
        example = row.layout(*(torch.empty(shape, device="meta") for shape in row.sources.values()))
        stored[row.target] = StoredTensor(
            shape=tuple(example.shape),
            dtype=dtype,
            chunks=tuple(partial(_make, row.layout, weights, names, dtype) for names in chunks),
            is_stacked=row.is_stacked,
        )
    dropped: Counter[str] = Counter()
    for name in weights.headers.keys() - used:
        reason = next((row.reason for row in rows if isinstance(row, Drop) and fnmatchcase(name, row.pattern)), None)
        if reason is None:
            problems.append(f"unknown: {name} {list(weights.headers[name].shape)}")
        else:
            dropped[reason] += 1
    if problems:
        raise ValueError(
            f"{weights.name} does not hold the tensors of its architecture ({len(problems)} differences); it may be "
            "of another model, or incomplete:\n  " + "\n  ".join(sorted(problems))
        )
    return stored, dropped


def _problems(name: str, shape: tuple[int, ...], weights: Weights) -> list[str]:
    header = weights.headers.get(name)
    if header is None:
        return [f"missing: {name} {list(shape)}"]
    if header.shape != shape:
        return [f"wrong shape: {name} is {list(header.shape)}, the architecture has {list(shape)}"]
    if header.dtype not in FLOATING:
        return [f"wrong dtype: {name} is {header.dtype}; quantised weights cannot be converted"]
    return []


def _make(layout: Callable[..., Tensor], weights: Weights, names: list[str], dtype: torch.dtype) -> Tensor:
    return layout(*(weights.read(name).to(dtype) for name in names)).contiguous()
