"""CUDA graphs of what is frozen: a forward pass of many small kernels, handed to the GPU in one call.

A pass of CLIP-L is some 500 kernels, which the host takes longer to hand out than the GPU to run. A graph has fixed
addresses and shapes. So there is one for each number of pictures, rounded up; its inputs are copied to where it reads,
and its outputs from where it writes. Weights that have moved elsewhere make a new one.

Graphs run one after the other, on the stream that computes or, begun ahead (`begin`), on one beside it.

Only what is frozen: gradients of weights would have to be added up inside. And only the tower: the language model's
layers are large enough at 8192 tokens a row that the host is ahead of the GPU without one (docs/performance.md).
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

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
