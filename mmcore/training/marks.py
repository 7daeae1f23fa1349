"""Where this rank is in its training: cheap marks, which the watchdog reads when nothing goes on any more. No torch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Here:
    """As of the last mark."""

    step: int = 0
    part: str = ""
    keys: Sequence[str] = ()
    """Samples of the micro batch that is on its way."""
    moved: float = 0.0
    """When, by the monotonic clock."""


here = Here()


def at_step(step: int) -> None:
    """A step, from 1, begins."""
    here.step, here.keys = step, ()
    mark("data")


def at_batch(number: int, of: int, keys: Sequence[str]) -> None:
    """A micro batch, from 0, is on its way."""
    here.keys = keys
    mark(f"micro batch {number + 1} of {of}")


def mark(part: str) -> None:
    """Something else begins."""
    here.part, here.moved = part, time.monotonic()


def beat(*_: Any) -> None:
    """It goes on."""
    here.moved = time.monotonic()
