"""How far a run is and when it will be done: a bar on a terminal, a line a minute elsewhere."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Between lines where there is no terminal.
SECONDS = 60.0


class AnswerProgress:
    """Tells on stderr how many answers there are, and what time is left at the speed so far."""

    def __init__(self, what: str, total: int, *, is_shown: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            what: is done, before the numbers.
            total: answers.
            is_shown: whether this process is the one that tells.
        """
        self.what, self.total, self.is_shown, self.clock = what, total, is_shown, clock
        self.answers = self.tokens = 0
        self.began = self.told = clock()
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (is_shown and console.is_terminal),
        )
        self.task = self.bar.add_task(what, total=total, speed="")

    def __enter__(self) -> "AnswerProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, answers: int, tokens: int) -> None:
        """So many more are there."""
        self.answers += answers
        self.tokens += tokens
        seconds = self.clock() - self.began
        speed = f"{self.tokens / max(seconds, 1e-9):.0f} tokens/s"
        self.bar.update(self.task, completed=self.answers, speed=speed)
        if self.bar.disable and self.is_shown and self.clock() - self.told >= SECONDS:
            self.told = self.clock()
            print(self.line(seconds, speed), file=sys.stderr, flush=True)

    def line(self, seconds: float, speed: str) -> str:
        """The same in a line."""
        left = seconds / self.answers * (self.total - self.answers) if self.answers else None
        rest = "time left unknown" if left is None else f"{_clock(left)} left"
        return f"{self.what} {self.answers}/{self.total} | {speed} | {_clock(seconds)} so far, {rest}"


def _clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
