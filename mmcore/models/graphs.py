"""CUDA graphs: passes of many small kernels, handed to the GPU in one call.

A pass of CLIP-L is some 500 kernels, which the host takes longer to hand out than the GPU to run. A graph has fixed
addresses and shapes. So there is one for each number of pictures, rounded up; its inputs are copied to where it reads,
and its outputs from where it writes. Weights that have moved elsewhere make a new one.

Graphs run one after the other, on the stream that computes or, begun ahead (`begin`), on one beside it.

The frozen tower's forward pass is `Graphs`; passes of the language model's layers, trained or frozen, are `RowGraphs`,
on demand: at 8192 tokens a row the host is ahead of the GPU without them (docs/performance.md).
"""

import contextlib
import functools
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mmcore import host
from mmcore.models.kernels import WorkSpaces

MULTIPLE = 4
"""Pictures that a graph's number is a multiple of: what is blank is computed too."""
MOST = 256
"""Pictures of the largest graph. Beyond it kernels are large enough, and graphs would be many."""

Place = tuple[int, ...]


def graph_size(number: int, multiple: int = MULTIPLE) -> int:
    """Pictures of the graph that computes so many; 0 where there is none."""
    size = -(-number // multiple) * multiple
    return size if 0 < size <= MOST else 0


class Graphs:
    """A function of pictures [n, ...] to features [n, ...], of each picture by itself, as graphs."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function, self._spaces = function, WorkSpaces()
        self._graphs: dict[int, host.Captured] = {}
        self._place: Place = ()
        self._side: host.SideStream | None = None
        self._begun: deque[tuple[Tensor, Tensor, Any]] = deque()

    def __call__(self, images: Tensor, weights: Iterable[Tensor]) -> Tensor:
        """Compute it.

        Args:
            images: of a number that `graph_size` has a graph for.
            weights: all that the function reads.
        """
        place = (*(weight.data_ptr() for weight in weights), *images.shape[1:])
        if place != self._place:
            self._graphs, self._place = {}, place
        number, size = len(images), graph_size(len(images))
        if size not in self._graphs:
            blank = F.pad(images, (0, 0) * (images.dim() - 1) + (0, size - number))
            with self._spaces.own():
                self._graphs[size] = host.Captured(self._function, blank)
        return self._graphs[size].run(images)

    def begin(self, images: Tensor, weights: Iterable[Tensor]) -> None:
        """Compute it on a stream beside what computes, for `take`; nothing where that is done already.

        Args:
            images, weights: as of a call.
        """
        if any(images is begun for begun, _, _ in self._begun):
            return
        self._side = self._side or host.SideStream()
        with self._side.queue(after=True):
            features = self(images, weights)
        self._begun.append((images, features, self._side.end()))

    def take(self, images: Tensor) -> Tensor | None:
        """What was begun for these pictures, in the order in which it was; None where it was not."""
        if not self._begun or self._begun[0][0] is not images:
            self._begun.clear()  # of a pass that was broken off
            return None
        _, features, end = self._begun.popleft()
        host.wait_for(end, [features])
        return features


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A packed row as the language model's layers take it, of a shape that comes again."""

    hidden: Tensor  # [s, 1, h]
    angles: Tensor  # of rotary embeddings, as the layers want them
    cu_seqlens: Tensor  # int32 [segments + 1]
    read: Tensor  # int64 [t], positions that are read
    longest: int
    """Tokens of the longest segment, at most."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.hidden, self.angles, self.cu_seqlens, self.read

    @property
    def shape(self) -> Hashable:
        """What a graph is made for."""
        return self.longest, *(tensor.shape for tensor in self.tensors)


ROW_MULTIPLE = 256
"""Tokens, tokens of the longest segment and positions that are read are multiples of this, by filling up."""
SEGMENT_MULTIPLE = 8
"""Segments likewise, by empty ones."""
SIGHTS = 2
"""How often a shape is computed kernel by kernel before a graph is made of it."""
MOST_ROWS = 64
"""Graphs of the language model. They share their memory, but each has some thousand kernels to keep."""


def can_be_graphs(config: TransformerConfig) -> bool:
    """Whether passes of the language model's layers may be graphs: they are whole on a rank, and kept as they are.

    Weights that are gathered as their module is called would not be, and ranks that share a layer or a row wait for
    each other in the midst of it.
    """
    return (
        config.tensor_model_parallel_size == 1
        and config.pipeline_model_parallel_size == 1
        and config.context_parallel_size == 1
        and config.recompute_granularity is None
    )


class RowGraphs:
    """The language model's layers on packed rows, forward and back, as graphs; also where they are trained.

    Gradients of weights are added to DDP's buffers inside, as Transformer Engine's layers do by themselves, and are
    told to be there (`grad_added_to_main_grad`), so that DDP's hooks do all but add them. A row is padded to a shape
    that comes again; what comes once is computed kernel by kernel.
    """

    def __init__(self, decode: Callable[[Row], Tensor], layers: nn.Module) -> None:
        """
        Args:
            decode: a row to what is read of it, [t, 1, h].
            layers: with all weights that it reads.
        """
        self._decode, self._layers = decode, layers
        self._sights: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, host.CapturedPass] = {}
        self._place: Place = ()

    def __call__(self, row: Row) -> Tensor:
        """Compute it; in a forward pass whose backward pass comes before the next forward pass."""
        weights = tuple(self._layers.parameters())
        trained = tuple(weight for weight in weights if weight.requires_grad)
        place = (*(weight.data_ptr() for weight in weights), *(_sum(weight).data_ptr() for weight in trained))
        if place != self._place:
            self._graphs, self._place = {}, place
            self._sights.clear()
        # The first pass of a step turns weights into FP8, the others take what it kept.
        layers: Any = self._layers.modules()
        fresh = [layer for layer in layers if getattr(layer, "is_first_microbatch", False)]
        kind = (len(fresh) if fresh and fresh[0].config.fp8 else 0, row.shape)
        self._sights[kind] += 1
        if kind not in self._graphs and (self._sights[kind] <= SIGHTS or len(self._graphs) >= MOST_ROWS):
            for weight in trained:
                vars(weight)["grad_added_to_main_grad"] = False  # as its own layer will say
            return self._decode(row)
        if kind not in self._graphs:
            self._graphs[kind] = self._captured(row, trained)
        for layer in fresh:
            layer.is_first_microbatch = False
        output: Tensor = _Pass.apply(self._graphs[kind], trained, row.tensors, row.hidden, *trained)
        return output

    def _captured(self, row: Row, trained: Iterable[nn.Parameter]) -> host.CapturedPass:
        """Other leaves stand for weights whose layers do not add gradients by themselves.

        What adds up a weight's gradient belongs to the stream that DDP was made on, which may not take part in a graph.
        """
        layers: Any = self._layers.modules()
        alone = {id(layer.weight) for layer in layers if getattr(layer, "fuse_wgrad_accumulation", False)}
        leaves = {weight: weight.detach().requires_grad_() for weight in trained if id(weight) not in alone}

        def decode(hidden: Tensor, angles: Tensor, cu_seqlens: Tensor, read: Tensor) -> Tensor:
            with _in_place_of(self._layers, leaves):
                return self._decode(
                    Row(hidden=hidden, angles=angles, cu_seqlens=cu_seqlens, read=read, longest=row.longest)
                )

        return host.CapturedPass(decode, row.tensors, [(leaf, _sum(weight)) for weight, leaf in leaves.items()])


@contextlib.contextmanager
def _in_place_of(layers: nn.Module, leaves: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Let modules read the leaves where they have the weights."""
    places = [
        (module._parameters, name, weight)
        for module in layers.modules()
        for name, weight in module._parameters.items()
        if weight in leaves
    ]
    parameters: Any
    for parameters, name, weight in places:
        parameters[name] = leaves[weight]
    try:
        yield
    finally:
        for parameters, name, weight in places:
            parameters[name] = weight


def _sum(weight: nn.Parameter) -> Tensor:
    """DDP's buffer of its gradient."""
    buffer: Tensor = vars(weight)["main_grad"]
    return buffer


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: host.CapturedPass, trained: Any, inputs: Any, *_: Tensor) -> Tensor:
        ctx.captured, ctx.trained = captured, trained
        return captured.forward(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient = ctx.captured.backward(gradients[0])
        for weight in ctx.trained:
            vars(weight)["grad_added_to_main_grad"] = True
        return (
            None,
            None,
            None,
            gradient,
            *(_nothing(weight.shape, weight.dtype, weight.device) for weight in ctx.trained),
        )


def _nothing(*kind: Any) -> Tensor:
    """A gradient for DDP's hook to drop."""
    return _memory(*kind).detach()


@functools.cache
def _memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
