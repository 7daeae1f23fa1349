"""A save that is killed, or whose disk fails, at each of the calls that it makes on files.

For a process into which `disk.c` is preloaded: tests/faults/test_events.py starts it.
"""

import errno
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from mmcore import checkpoint, distributed
from mmcore import checkpoint_files as files
from mmcore.config import ParallelConfig
from tests import ranks, tiny
from tests.faults import disk
from tests.faults.chain import RANKS, Chain, sums
from tests.faults.jobs import small
from tests.faults.size import SIZE, spread
from tests.training.test_saving import Run

PAIR = ParallelConfig(tensor_model_parallel_size=2)


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


FAILURES = {
    "EIO once": (disk.ANY, errno.EIO, False),
    "EIO for ever": (disk.ANY, errno.EIO, True),
    "ENOSPC for ever": (disk.GROWS, errno.ENOSPC, True),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_disk_fails_at_every_event(kind: str, tmp_path: Path, tell: Any) -> None:
    """Of each of two ranks: both hear of it, and what is published is whole and no other than it was."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "words").write_text("one two")
    kinds, error, lasts = FAILURES[kind]

    def save() -> list[tuple[str, str]]:
        with mock.patch.object(tiny, "build", partial(tiny.build, arch=small(tiny.LANGUAGE.vocab_size))):
            run = Run(PAIR, tmp_path, keep_last=1)
        run.save(1).finish()
        step, found = 2, []
        own = distributed.Rank.from_environment().rank
        log = tmp_path / "events"
        disk.arm(tmp_path, kinds)
        run.save(step).finish()
        counts: list[Any] = [None] * RANKS
        dist.all_gather_object(counts, disk.disarm())
        for victim, count in enumerate(counts):
            for number in spread(count, SIZE.faults // RANKS):
                before = {path: sums(path) for path in files.step_folders(tmp_path)}
                step, told = step + 1, ""
                run.config = replace(run.config, async_save=step % 2 == 1)
                if distributed.is_main():
                    files.clear_incomplete(tmp_path)
                dist.barrier()
                if own == victim:
                    disk.arm(tmp_path, kinds, number, error, lasts=lasts, log=str(log))
                try:
                    run.save(step).finish()
                except checkpoint.SaveError as failure:
                    told = str(failure)
                disk.disarm()
                dist.barrier()
                event = f"rank {victim}, {log.read_text().splitlines()[number - 1]}"
                after = {path: sums(path) for path in files.step_folders(tmp_path)}
                assert after and not any(files.verify(path) for path in after), event
                new = files.step_folder(tmp_path, step)
                assert all(before.get(path, content) == content for path, content in after.items()), event
                assert new in after or after == before, event
                assert told or new in after, event  # what fails right after the new name was given is told, too
                assert not told or (f"[Errno {error}]" in told and "Traceback" not in told), told
                found.append((event, told))
        return found

    results = ranks.run(save, PAIR, RANKS, timeout=3000)
    assert results[0] == results[1]
    harmless = [event.split()[3:] for event, told in results[0] if not told]
    for call, *path in harmless:  # a folder that is there, and a copy that goes on in another way
        assert call == "sendfile" or (call == "mkdir" and (not path or "tokenizer" not in path[0])), (call, path)
    failed = len(results[0]) - len(harmless)
    tell(
        "a save never hangs",
        f"{kind}: {failed} saves failed on both ranks, and {len(harmless)} were none the worse; what was published "
        "before, and all that is, is whole",
    )
