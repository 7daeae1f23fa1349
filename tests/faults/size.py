"""How much is tried: a part of it with the other tests, all of it by `python -m tests.faults --full`."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of one of the two forms."""

    events: int
    """Of the file events of a start, and of each rank's save, at which it is killed, how many, evenly spread; 0 for
    all of them."""
    kills: int
    """At random moments."""
    faults: int
    """As `events`, of each rank's calls that fail."""
    flips: int
    swaps: int
    truncations: int
    workers: tuple[tuple[int, int], ...]
    """Loader workers of a run, and of its resumption."""
    steps: int
    """Over which a resumption is compared."""
    exact_layouts: tuple[str, ...]
    """At which it is exact."""
    layouts: tuple[tuple[str, str], ...]
    """Written, read."""
    launched: bool
    """Whether torchrun is started too."""


LAYOUTS = tuple(f"tp{tensor}pp{pipeline}dp{data}" for tensor in (1, 2) for pipeline in (1, 2) for data in (1, 2))
SHORT = Size(
    events=2,
    kills=30,
    faults=4,
    flips=100,
    swaps=20,
    truncations=20,
    workers=((2, 2), (2, 0)),
    steps=50,
    exact_layouts=("tp1pp1dp1",),
    layouts=(("tp2pp1dp2", "tp1pp2dp1"), ("tp1pp2dp1", "tp2pp1dp2")),
    launched=False,
)
FULL = Size(
    events=0,
    kills=300,
    faults=0,
    flips=1000,
    swaps=100,
    truncations=100,
    workers=((0, 0), (2, 2), (4, 4), (0, 4), (4, 2)),
    steps=50,
    exact_layouts=("tp1pp1dp1", "tp2pp1dp1", "tp1pp2dp1", "tp1pp1dp2"),
    layouts=tuple((written, read) for written in LAYOUTS for read in LAYOUTS if written != read),
    launched=True,
)
SIZE = FULL if os.environ.get("MMCORE_FAULTS") == "full" else SHORT


def spread(count: int, number: int) -> list[int]:
    """Of 1 to `count` as many as asked for, evenly spread from the first to the last; all of them for 0."""
    number = min(number or count, count)
    return sorted({1 + round(index * (count - 1) / max(1, number - 1)) for index in range(number)})
