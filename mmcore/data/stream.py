"""One of the streams that a run's data is dealt to: micro batches, and the place after each.

A run has the same streams from its first step to its last, on however many ranks and workers they are
read. A place is a few numbers; from them a stream goes on with the very same batches.
"""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mmcore.data.batch import Batch, EncodedSample, collate
from mmcore.data.conversation import EncodedConversation
from mmcore.data.dataset import Dataset, RawSample
from mmcore.data.order import Draws, Order
from mmcore.data.packing import pack
from mmcore.data.task_encoder import Layout, encode_sample, lay_out
from mmcore.data.workers import reading

# Samples among which not too many may be broken.
SKIP_WINDOW = 1000


class TooManySkippedError(RuntimeError):
    """So many samples cannot be used that something is wrong with the data or with reading it."""


@dataclass(slots=True)
class Count:
    """Of one source, so far."""

    samples: int = 0
    """Trained on."""
    skipped: int = 0
    """Not to be used."""
    cut: int = 0
    """Longer than seq_length."""
    recent: int = 0
    """Read in the present window of SKIP_WINDOW samples."""
    recent_skipped: int = 0


@dataclass(frozen=True, slots=True)
class Cursor:
    """Which sample is read next."""

    epochs: tuple[int, ...]
    """Of each order."""
    positions: tuple[int, ...]
    """In the stream's share of that epoch."""
    draws: int = 0
    """Samples read in all."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream stands between two batches."""

    cursor: Cursor
    """Where the buffer begins whose rows are being taken."""
    rows: int
    """Rows of it that were taken."""
    counts: tuple[Count, ...]
    """Of each source, what the rest of the buffer has added included."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Place":
        """What `dataclasses.asdict` made of one, by way of JSON."""
        cursor = content["cursor"]
        return cls(
            Cursor(tuple(cursor["epochs"]), tuple(cursor["positions"]), cursor["draws"]),
            content["rows"],
            tuple(Count(**count) for count in content["counts"]),
        )


class LaidOut(NamedTuple):
    """A sample whose length is known; its pictures are still files."""

    sample: RawSample
    conversation: EncodedConversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """A dataset with the orders in which streams read it."""

    dataset: Dataset
    orders: tuple[Order, ...]
    """One of all sources; or one of each, from which draws are made by weight."""
    seed: int

    def draws(self, stream: int) -> Draws | None:
        if not self.dataset.by_weight:
            return None
        return Draws([source.weight or 0.0 for source in self.dataset.sources], self.seed, stream)


def build_blend(dataset: Dataset, *, num_streams: int, window: int, seed: int) -> Blend:
    """Put a dataset's samples in order.

    Args:
        window: samples of a stream that are shuffled among each other; 0 keeps the order of the shards.
    """
    settings = {"num_streams": num_streams, "window": window, "seed": seed}
    sizes = {source.number: len(source) for source in dataset.sources}
    if dataset.by_weight:
        orders = tuple(Order({number: size}, [1.0], **settings) for number, size in sizes.items())
    else:
        times = [1.0 if source.repetitions is None else source.repetitions for source in dataset.sources]
        orders = (Order(sizes, times, **settings),)
    return Blend(dataset=dataset, orders=orders, seed=seed)


class Stream(Iterator[tuple[Batch, Place]]):
    """Micro batches without end, each with the place behind it."""

    def __init__(
        self,
        number: int,
        blend: Blend,
        layout: Layout,
        *,
        micro_batch_size: int,
        packing_buffer_size: int,
        max_skipped: float,
        place: Place | None = None,
    ) -> None:
        """
        Args:
            micro_batch_size: rows of a batch; without packing a row is a sample.
            packing_buffer_size: samples that are looked at to fill rows; 0 does not pack.
            max_skipped: largest fraction of SKIP_WINDOW samples of one source that may be skipped.
            place: where to go on; the beginning if left out.
        """
        self.number, self.blend, self.layout = number, blend, layout
        self.micro_batch_size, self.packing_buffer_size = micro_batch_size, packing_buffer_size
        self.max_skipped = max_skipped
        self._draws = blend.draws(number)
        self._rows: deque[list[LaidOut]] = deque()
        self._taken = 0
        zeros = (0,) * len(blend.orders)
        self._begin = self._cursor = place.cursor if place else Cursor(zeros, zeros)
        self._counts = [Count() for _ in blend.dataset.sources]
        if place and place.rows:
            self._fill()
            for _ in range(place.rows):
                self._rows.popleft()
            self._taken = place.rows
        if place:  # what the buffer counted above is in it already
            self._counts = [replace(count) for count in place.counts]

    @property
    def place(self) -> Place:
        counts = tuple(replace(count) for count in self._counts)
        return Place(self._begin, self._taken, counts) if self._rows else Place(self._cursor, 0, counts)

    def __next__(self) -> tuple[Batch, Place]:
        rows: list[list[EncodedSample]] = []
        while len(rows) < self.micro_batch_size:
            if row := self._encode(self._next_row()):
                rows.append(row)
        samples = [sample for row in rows for sample in row]
        return collate(samples, len(self.blend.dataset.sources)), self.place

    def _next_row(self) -> list[LaidOut]:
        while not self._rows:
            self._fill()
        self._taken += 1
        return self._rows.popleft()

    def _fill(self) -> None:
        """Lay out the samples from here on, and deal them to rows."""
        self._begin, self._taken = self._cursor, 0
        found = list(self._lay_out(max(1, self.packing_buffer_size)))
        if self.packing_buffer_size:
            rows = pack([len(item.conversation) for item in found], self.layout.seq_length)
        else:
            rows = [[index] for index in range(len(found))]
        self._rows = deque([found[index] for index in row] for row in rows)

    def _lay_out(self, most: int) -> Iterator[LaidOut]:
        """Up to `most` samples, fewer where they cannot be used, or where an epoch ends."""
        for _ in range(most):
            number, index, is_last = self._draw()
            sample = None
            try:
                sample = self.blend.dataset.sources[number].read(index)
                if sample is not None:
                    yield LaidOut(sample, lay_out(sample.parts, self.layout))
            except ValueError as error:
                self._skip(number, sample, error)
            if is_last:
                return

    def _draw(self) -> tuple[int, int, bool]:
        """Source and sample that come next, and whether an epoch ends with it."""
        cursor = self._cursor
        chosen = self._draws.at(cursor.draws) if self._draws else 0
        order, epoch, position = self.blend.orders[chosen], cursor.epochs[chosen], cursor.positions[chosen]
        while position == len(order.share(epoch, self.number)):  # also where an epoch has nothing for this stream
            epoch, position = epoch + 1, 0
        source, index = order.at(epoch, self.number, position)
        is_last = not self._draws and position + 1 == len(order.share(epoch, self.number))
        epochs, positions = list(cursor.epochs), list(cursor.positions)
        epochs[chosen], positions[chosen] = epoch, position + 1
        self._cursor = Cursor(tuple(epochs), tuple(positions), cursor.draws + 1)
        self._count(source).recent += 1
        return source, index, is_last

    def _encode(self, row: Sequence[LaidOut]) -> list[EncodedSample]:
        encoded = []
        for sample, conversation in row:
            reading(f"{sample.shard}, sample {sample.key}")
            try:
                found = encode_sample(sample.key, sample.parts, conversation, self.layout)
            except ValueError as error:
                self._skip(sample.source, sample, error)
                continue
            found.source = sample.source
            count = self._count(sample.source)
            count.samples += 1
            count.cut += conversation.was_cut
            encoded.append(found)
        return encoded

    def _count(self, source: int) -> Count:
        """Of a source, with a new window when the last is full."""
        count = self._counts[source]
        if count.recent == SKIP_WINDOW:
            count.recent = count.recent_skipped = 0
        return count

    def _skip(self, source: int, sample: RawSample | None, error: ValueError) -> None:
        count = self._count(source)
        count.skipped += 1
        count.recent_skipped += 1
        name = self.blend.dataset.sources[source].name
        what = f"{name}, {sample.shard}, sample {sample.key}: {error}" if sample else f"{name}: {error}"
        print(f"mmcore: skipped: {what}", file=sys.stderr, flush=True)
        if count.recent_skipped > min(self.max_skipped * SKIP_WINDOW, SKIP_WINDOW - 1):
            raise TooManySkippedError(
                f"{count.recent_skipped} of {SKIP_WINDOW} samples in a row of {name} cannot be used, and "
                f"--data.max-skipped allows {self.max_skipped:.1%}; the last is {what}. `mmcore inspect` finds "
                "them all: prepare the dataset again"
            )
