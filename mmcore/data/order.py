"""In which order samples are read: pure functions of a seed, so that a place in the data is two numbers.

An epoch's samples are cut into blocks of neighbours, the blocks shuffled and dealt to streams, each
stream as many samples as the others or one more. Within its share a stream shuffles by windows. So
samples that are read soon after each other lie near each other on disk, and come from all over it.
"""

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Samples of a block; more in a dataset of above BLOCK_SIZE * MAX_BLOCKS, so that a billion take little memory.
BLOCK_SIZE, MAX_BLOCKS = 100, 1_000_000

Integers = NDArray[np.int64]

# What a generator is for: no two uses share their numbers.
BLOCKS, TURN, WINDOW, DRAWS = range(4)


def generator(seed: int, *place: int) -> np.random.RandomState:
    """Of all numpy's generators, the one whose numbers stay the same in every version (NEP 19)."""
    return np.random.RandomState(np.array([seed % 2**32, *place], np.uint32))


class Runs(NamedTuple):
    """Stretches of samples, one after the other."""

    source: Integers
    start: Integers
    """Of each in its source."""
    end: Integers
    """Of each in this sequence: its length and all before it."""

    def __len__(self) -> int:
        return int(self.end[-1]) if self.end.size else 0

    def at(self, position: int) -> tuple[int, int]:
        """Source and sample at a position of this sequence."""
        run = int(np.searchsorted(self.end, position, side="right"))
        behind = int(self.end[run]) - position
        length = int(self.end[run]) - (int(self.end[run - 1]) if run else 0)
        return int(self.source[run]), int(self.start[run]) + length - behind

    def part(self, begin: int, end: int) -> "Runs":
        """Those from position `begin` up to `end`, runs cut where they must."""
        first, last = np.searchsorted(self.end, [begin, end - 1], side="right") if begin < end else (0, -1)
        chosen = slice(first, last + 1)
        lengths = np.diff(self.end, prepend=0)
        begins = np.maximum(self.end - lengths, begin)[chosen]
        cut = begins - (self.end - lengths)[chosen]
        return Runs(self.source[chosen], self.start[chosen] + cut, np.minimum(self.end[chosen], end) - begin)


class Order:
    """The endless order in which streams read one or several sources, epoch after epoch."""

    def __init__(
        self,
        sizes: Mapping[int, int],
        repetitions: Sequence[float],
        *,
        num_streams: int,
        window: int,
        seed: int,
    ) -> None:
        """
        Args:
            sizes: samples of each source, by its number.
            repetitions: times that an epoch holds each; of half a source, every other epoch has the
                other half.
            window: samples that are shuffled among each other; 0 shuffles nothing, blocks included.
        """
        self.sizes, self.repetitions = sizes, repetitions
        self.num_streams, self.window, self.seed = num_streams, window, seed
        self.name = min(sizes)  # of two orders with one seed
        # Streams are read side by side, and one is in the next epoch before the others are.
        self._runs = functools.lru_cache(2)(self._make_runs)
        self.share = functools.lru_cache(2 * num_streams)(self._make_share)
        self._window = functools.lru_cache(2 * num_streams)(self._make_window)

    def _make_share(self, epoch: int, stream: int) -> Runs:
        """What a stream reads of an epoch, before windows are shuffled."""
        runs = self._runs(epoch)
        begin, end = (len(runs) * place // self.num_streams for place in (stream, stream + 1))
        return runs.part(begin, end)

    def at(self, epoch: int, stream: int, position: int) -> tuple[int, int]:
        """Source and sample that a stream reads at a position of its share."""
        share = self.share(epoch, stream)
        if self.window:
            number, place = divmod(position, self.window)
            position = number * self.window + int(self._window(epoch, stream, number)[place])
        return share.at(position)

    def _make_window(self, epoch: int, stream: int, number: int) -> Integers:
        size = min(self.window, len(self.share(epoch, stream)) - number * self.window)
        return generator(self.seed, WINDOW, self.name, epoch, stream, number).permutation(size)

    def _make_runs(self, epoch: int) -> Runs:
        """Blocks of an epoch, shuffled."""
        sources, starts, lengths = [], [], []
        for number, size, times in zip(self.sizes, self.sizes.values(), self.repetitions, strict=True):
            begin, end = (int(times * size * place + 1e-6) for place in (epoch, epoch + 1))  # a third, three times: 1
            for start, length in self._endless(number, size, begin, end):
                sources.append(np.full(len(start), number))
                starts.append(start)
                lengths.append(length)
        source, start, length = (np.concatenate(parts) for parts in (sources, starts, lengths))
        if self.window:
            mixed = generator(self.seed, BLOCKS, self.name, epoch).permutation(len(source))
            source, start, length = source[mixed], start[mixed], length[mixed]
        return Runs(source, start, np.cumsum(length))

    def _endless(self, number: int, size: int, begin: int, end: int) -> list[tuple[Integers, Integers]]:
        """Starts and lengths of the blocks from `begin` to `end` of a source read over and over."""
        block = max(BLOCK_SIZE, -(-size // MAX_BLOCKS))
        found = []
        for turn in range(begin // size, -(-end // size)):
            starts = np.arange(0, size, block)
            # A turn that several epochs share is shuffled here, so that each gets a part of all of it.
            is_shared = begin > turn * size or end < (turn + 1) * size
            if self.window and is_shared:
                starts = starts[generator(self.seed, TURN, number, turn).permutation(len(starts))]
            ends = np.cumsum(np.minimum(block, size - starts))
            runs = Runs(np.zeros_like(starts), starts, ends)
            part = runs.part(max(begin - turn * size, 0), min(end - turn * size, size))
            found.append((part.start, np.diff(part.end, prepend=0)))
        return found


class Draws:
    """Which source each draw of a stream is from, in a blend by weight."""

    # Draws that are made together.
    SIZE = 1024

    def __init__(self, weights: Sequence[float], seed: int, stream: int) -> None:
        self._ends = np.cumsum(weights) / sum(weights)
        self._made = functools.lru_cache(2)(lambda number: self._make(seed, stream, number))

    def at(self, draw: int) -> int:
        number, place = divmod(draw, self.SIZE)
        return min(bisect.bisect_right(self._ends, self._made(number)[place]), len(self._ends) - 1)

    def _make(self, seed: int, stream: int, number: int) -> NDArray[np.float64]:
        return generator(seed, DRAWS, stream, number).random_sample(self.SIZE)
