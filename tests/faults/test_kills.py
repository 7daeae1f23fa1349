"""A run that is killed at any moment goes on as if nothing had happened, bit for bit."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.chain import Chain
from tests.faults.jobs import Job
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
