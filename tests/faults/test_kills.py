"""A run that is killed at any moment goes on as if nothing had happened, bit for bit."""

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from mmcore import checkpoint_files as files
from tests.faults.chain import RANKS, STEPS, Chain
from tests.faults.jobs import Job, arguments
from tests.faults.size import SIZE


def at_random(draw: random.Random) -> Any:
    """Let a rank live for a while, and kill it, or all of them: what a launcher ends when one has failed."""

    def live(job: Job) -> None:
        if draw.random() > 0.2:  # else it may not have come to its first step yet
            while "step " not in job.said():
                assert not job.look(), job.said()
                time.sleep(0.002)
        until = time.monotonic() + draw.random() * 0.8
        while time.monotonic() < until and not job.look():
            time.sleep(0.001)
        job.kill(draw.choice([None, 0, 1]))

    return live


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_killed_at_any_moment(async_save: bool, inputs: Path, whole: Path, tmp_path: Path, tell: Any) -> None:
    chain, draw = Chain(inputs, tmp_path, whole, async_save=async_save), random.Random(7)
    for _ in range(SIZE.kills // 2):
        chain.life(at_random(draw))
    chain.finish()
    mode = "in the background" if async_save else "at once"
    tell(
        "kill at random moments",
        f"{chain.lives} SIGKILLs, saving {mode}: nothing lost or changed, {chain.torn} within a save or a deletion, "
        f"at most {chain.lost} steps done again",
    )


def test_killed_in_its_last_deletion(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """A run that is done saves no more: it is its start that clears away what is half deleted or half written."""
    run = shutil.copytree(whole, tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    (run / f"{files.INCOMPLETE}step_00000001").mkdir()
    (run / f"{files.INCOMPLETE}step_00000001" / "run.json").write_text("{}")
    (run / ".report.html.4242").write_text("<html>")
    job = Job(arguments(inputs, run, STEPS), RANKS, tmp_path / "notes")
    assert job.wait() == dict.fromkeys(range(RANKS), 0), job.said()
    assert "nothing to do" in job.said() and {path.name for path in run.iterdir()} == before
