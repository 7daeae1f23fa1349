"""Batches on the GPU before they are wanted.

While the GPU computes a step, the host reads the next one's batches and has them copied beside the computing. There is
no thread: the loader's workers read ahead on their own, and what is broadcast in a replica goes out at one point of the
step on all of its ranks. That waits for the ranks of a replica of several, but for no kernel of a replica of one.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mmcore import host
from mmcore.data.batch import Batch
from mmcore.data.stream import Count


class Batches(Protocol):
    """What is read ahead."""

    def __next__(self) -> Batch: ...

    def counts(self) -> Mapping[str, Count]:
        """Of each source of the data, what was read so far."""

    def state(self) -> bytes | None:
        """From which the next batches can be read again."""


@dataclass(slots=True, kw_only=True)
class _Read:
    batch: Batch | Exception
    end: Any
    """Of the copies to the GPU."""
    counts: Mapping[str, Count]
    state: bytes | None


class Prefetch(Iterator[Batch]):
    """Batches in their order; all that is told of them is as of the last that was taken, not of those read ahead."""

    def __init__(self, batches: Batches) -> None:
        self.waited = 0.0
        self._batches, self._side = batches, host.SideStream()
        self._ahead: deque[_Read] = deque()
        self._counts, self._state = batches.counts(), batches.state()

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            Exception: what reading it raised, when its turn has come.
        """
        if not self._ahead:
            started = time.monotonic()
            self._read()
            self.waited += time.monotonic() - started
        read = self._ahead.popleft()
        if isinstance(read.batch, Exception):
            raise read.batch
        parts = [getattr(read.batch, name) for name in read.batch.__dataclass_fields__]
        host.wait_for(read.end, [part for part in parts if isinstance(part, Tensor)])
        self._counts, self._state = read.counts, read.state
        return read.batch

    def read_ahead(self, number: int) -> None:
        """Read until so many batches are there, or one cannot be read.

        It is waiting only where the GPU has nothing left to do by the end.
        """
        started, queued = time.monotonic(), host.tick()
        while len(self._ahead) < number and not (self._ahead and isinstance(self._ahead[-1].batch, Exception)):
            self._read()
        if host.has_passed(queued):
            self.waited += time.monotonic() - started

    def keep_pace(self, number: int, of: int, done: int) -> None:
        """Read ahead in the course of a step, one batch for each of the step's own: at its end, which is near by then,
        the GPU would run out of work before all are read.

        Args:
            number: batches that are to be there when the step is done.
            of, done: batches of the step, and how many of them are on their way.
        """
        self.read_ahead(number if done >= of else min(done, number))

    def _read(self) -> None:
        with self._side.queue():
            batch: Batch | Exception
            try:
                batch = next(self._batches)
            except Exception as error:  # of a batch that is not wanted yet: the ones before it are trained first
                batch = error
        read = _Read(batch=batch, end=self._side.end(), counts=self._batches.counts(), state=self._batches.state())
        self._ahead.append(read)

    def counts(self) -> Mapping[str, Count]:
        """Of each source, what was read until the last batch that was taken."""
        return self._counts

    def state(self) -> bytes | None:
        """From which the batches after the last that was taken can be read again."""
        return self._state
