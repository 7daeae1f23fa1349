"""A save that is killed, or whose disk fails, at each of the calls that it makes on files.

For a process into which `disk.c` is preloaded: tests/faults/test_events.py starts it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmcore import checkpoint
from tests.faults import disk
from tests.faults.chain import RANKS, Chain
from tests.faults.size import SIZE, spread


def at_first_save(victim: int, run: Path, number: int = 0, log: str = "") -> Callable[[int], None]:
    """Arm the disk when a rank begins its first save; when it begins another one, count no more."""

    def before(rank: int) -> None:
        begin, begun = checkpoint.Saving.__init__, []

        def counted(*args: Any, **kwargs: Any) -> None:
            begun.append(True)
            if len(begun) == 1:
                disk.arm(run, disk.CHANGES, number, log=log and f"{log}-{rank}")
            elif len(begun) == 2:
                disk.disarm()
            begin(*args, **kwargs)

        if rank == victim or log:
            checkpoint.Saving.__init__ = counted  # type: ignore[method-assign]

    return before


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_killed_at_every_event(async_save: bool, inputs: Path, whole: Path, tmp_path: Path, tell: Any) -> None:
    """Of each of two ranks; a write is torn in its middle."""
    chain, notes = Chain(inputs, tmp_path, whole, async_save=async_save), tmp_path / "events"
    chain.live_on(2)
    chain.live_on(2, at_first_save(0, chain.run, log=str(notes)))
    killed = 0
    for rank in range(RANKS):
        events = Path(f"{notes}-{rank}").read_text().splitlines()
        for number in spread(len(events), SIZE.events // RANKS):
            before = chain.newest
            job = chain.life(lambda job: job.wait(patience=0), at_first_save(rank, chain.run, number))
            assert job.ended[rank] == -9, (events[number - 1], job.said(rank))
            assert chain.newest in (before, before + 1), events[number - 1]
            killed += 1
    chain.finish()
