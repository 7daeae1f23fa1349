"""Weight maps: which source tensors make which tensor of megatron-core, strict both ways.

A map is a tuple of rows, and serves import and export. A tensor that no row names, one that a row names
and that is not there, and one of another shape than the architecture's are errors, all told at once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial, reduce
from typing import Literal

import torch
from checkpoint_folder import StoredTensor
from layout import Layout, keep
from torch import Tensor
from weight_files import Weights

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# More than any model has; a stranger's configuration may say billions.
MAX_LAYERS = 1000

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
"""What weights are stored as; "keep" is what they come as."""


@dataclass(frozen=True, slots=True)
class Move:
    """Make one of mcore's tensors from one or more of the source's, and those from it.

    A "{}" in the sources' names is the number of the layer; mcore keeps all layers in one tensor,
    stacked on a new first axis.
    """

    target: str
    sources: dict[str, tuple[int, ...]]
    """Names and the shapes they must have, in the order in which `layout` takes them."""
    layout: Layout = keep

    @property
    def is_stacked(self) -> bool:
        return any("{}" in name for name in self.sources)

    def names(self, num_layers: int) -> list[tuple[str, ...]]:
        """The sources' names, layer by layer."""
        layers = range(num_layers if self.is_stacked else 1)
        return [tuple(name.replace("{}", str(layer)) for name in self.sources) for layer in layers]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the target, of one layer where it is stacked."""
        return tuple(self.layout.pack(*(torch.empty(shape, device="meta") for shape in self.sources.values())).shape)


@dataclass(frozen=True, slots=True)
class Drop:
    """Leave source tensors out on purpose."""

    pattern: str
    """Their names; * stands for anything."""
    reason: str


class DifferencesError(ValueError):
    """Tensors that are not those of their architecture: `problems` are all of them."""

    def __init__(self, problems: list[str], name: str) -> None:
        super().__init__(
            f"{name} does not hold the tensors of its architecture ({len(problems)} differences); it may be "
            "of another model, or incomplete:\n  " + "\n  ".join(sorted(problems))
        )
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Tensors of another library that come from one of mcore's."""

    shapes: dict[str, tuple[int, ...]]
    """By name."""
    dtype: torch.dtype
    read: Callable[[], tuple[Tensor, ...]]
    """All of them, in the order of `shapes`."""
    origin: str
    """For the plan: what they are made of."""


def apply(
    rows: Sequence[Move | Drop], num_layers: int, weights: Weights, dtype: Dtype = "keep"
) -> tuple[dict[str, StoredTensor], Counter[str]]:
    """Check the source against the map and plan the conversion; reads no weights.

    Where tensors keep their dtypes and one is made of several, it gets the narrowest that holds them
    all, so nothing is rounded.

    Args:
        num_layers: what "{}" counts to.
        dtype: what to store; rounding is fine, a smaller range is not.
    Returns:
        mcore's tensors by name, and how many source tensors each reason left out.
    Raises:
        DifferencesError: unknown or missing tensors, wrong shapes, dtypes that are not floating point or
            whose range `dtype` does not hold.
    """
    if num_layers > max(len(weights.headers), MAX_LAYERS):
        raise DifferencesError([f"{num_layers} layers for {len(weights.headers)} tensors"], weights.name)
    problems: list[str] = []
    stored: dict[str, StoredTensor] = {}
    used: set[str] = set()
    for row in rows:
        if isinstance(row, Drop):
            continue
        chunks = row.names(num_layers)
        found = []
        for names in chunks:
            assert used.isdisjoint(names) and row.target not in stored, f"two rows for {row.target}"
            used.update(names)
            for name, shape in zip(names, row.sources.values(), strict=True):
                found += _problems(name, shape, weights, dtype)
        problems += found
        if found:
            continue
        kept = reduce(torch.promote_types, (weights.headers[name].dtype for names in chunks for name in names))
        wanted = kept if dtype == "keep" else getattr(torch, dtype)
        stored[row.target] = StoredTensor(
            shape=row.shape,
            dtype=wanted,
            chunks=tuple(partial(_make, row.layout, weights, names, wanted) for names in chunks),
            is_stacked=row.is_stacked,
            origins=tuple(f"{' + '.join(names)}, {row.layout.name}" for names in chunks),
        )
    dropped: Counter[str] = Counter()
    for name in weights.headers.keys() - used:
        reason = next((row.reason for row in rows if isinstance(row, Drop) and fnmatchcase(name, row.pattern)), None)
        if reason is None:
            problems.append(f"unknown: {name} {list(weights.headers[name].shape)}")
        else:
            dropped[reason] += 1
    _raise_if(problems, weights.name)
    return stored, dropped


def export(
    rows: Sequence[Move | Drop], num_layers: int, stored: dict[str, StoredTensor], dtype: Dtype = "keep"
) -> list[Parts]:
    """Check mcore's tensors against the map and plan the way back; reads no weights.

    Args:
        stored: the tensors of the parts that the rows are about, and no others.
        dtype: as in `apply`.
    Returns:
        What to write, tensors outside the layers first, then layer by layer.
    Raises:
        DifferencesError: unknown or missing tensors, wrong shapes, or a dtype whose range `dtype` does
            not hold.
    """
    problems: list[str] = []
    planned: list[tuple[int, Parts]] = []
    moves = {row.target: row for row in rows if isinstance(row, Move)}
    problems += [f"unknown: {key} {list(stored[key].global_shape)}" for key in stored.keys() - moves.keys()]
    for key, row in moves.items():
        chunks = row.names(num_layers)
        shape = ((num_layers,) if row.is_stacked else ()) + row.shape
        if key not in stored:
            problems.append(f"missing: {key} {list(shape)}")
            continue
        tensor = stored[key]
        if tensor.global_shape != shape:
            problems.append(f"wrong shape: {key} is {list(tensor.global_shape)}, the architecture has {list(shape)}")
            continue
        wanted = tensor.dtype if dtype == "keep" else getattr(torch, dtype)
        if _loses_range(tensor.dtype, wanted):
            problems.append(_range_lost(key, tensor.dtype, wanted))
            continue
        for layer, names in enumerate(chunks):
            parts = Parts(
                shapes=dict(zip(names, row.sources.values(), strict=True)),
                dtype=wanted,
                read=partial(_unmake, row.layout, tensor.chunks[layer], wanted),
                origin=f"{key}{f'[{layer}]' if row.is_stacked else ''}, {row.layout.name}",
            )
            planned.append((layer if row.is_stacked else -1, parts))
    _raise_if(problems, "the checkpoint")
    return [parts for _, parts in sorted(planned, key=lambda item: item[0])]


def plan(tensors: dict[str, StoredTensor], dropped: Counter[str]) -> Iterable[str]:
    """What --dry-run prints: every tensor, from where to where."""
    for key, tensor in tensors.items():
        kind = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for chunk, origin in enumerate(tensor.origins):
            yield f"{key}{f'[{chunk}]' if tensor.is_stacked else ''} {kind} <- {origin}"
    for reason, count in sorted(dropped.items()):
        yield f"left out {count}: {reason}"


def _raise_if(problems: list[str], name: str) -> None:
    if problems:
        raise DifferencesError(problems, name)


def _problems(name: str, shape: tuple[int, ...], weights: Weights, dtype: Dtype) -> list[str]:
    header = weights.headers.get(name)
    if header is None:
        return [f"missing: {name} {list(shape)}"]
    if header.shape != shape:
        return [f"wrong shape: {name} is {list(header.shape)}, the architecture has {list(shape)}"]
    if header.dtype not in FLOATING:
        return [f"wrong dtype: {name} is {header.dtype}; quantised weights cannot be converted"]
    if dtype != "keep" and _loses_range(header.dtype, getattr(torch, dtype)):
        return [_range_lost(name, header.dtype, getattr(torch, dtype))]
    return []


def _loses_range(held: torch.dtype, wanted: torch.dtype) -> bool:
    """Told by the exponents: the largest numbers of bfloat16 and float32 differ by rounding alone."""
    return torch.finfo(wanted).smallest_normal > torch.finfo(held).smallest_normal


def _range_lost(name: str, held: torch.dtype, wanted: torch.dtype) -> str:
    return f"range lost: {name} is {held}, whose largest values {wanted} does not hold"


def _make(layout: Layout, weights: Weights, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    return layout.pack(*(weights.read(name).to(dtype) for name in names)).contiguous()


def _unmake(layout: Layout, read: Callable[[], Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(part.to(dtype).contiguous() for part in layout.unpack(read()))
