"""A job that is asked to end, by SIGTERM or SIGUSR1: the step is finished, saved and published. No torch.

Schedulers send the one before they kill, and the other where they are told to (Slurm's `--signal`). A rank that has
heard it says so with the numbers that all ranks read of a step, so all of them end after the same one. Loader workers
let it pass: see mmcore.data.workers.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_heard: list[str] = []


class PreemptedError(Exception):
    """The run was asked to end; what it has done is in a checkpoint."""


def listen() -> None:
    """From here on a signal is noted, and no longer ends the process. It is never unlearned: `srun` sends SIGTERM to
    the ranks that are still there when the first has ended, and its exit code would become that of a signal."""
    for number in SIGNALS:
        signal.signal(number, _hear)


def _hear(number: int, _frame: FrameType | None) -> None:
    _heard.append(signal.Signals(number).name)


def heard() -> str:
    """The name of the first signal that came to this process, or ""."""
    return _heard[0] if _heard else ""
