"""Bad steps: how they are known, and what follows them."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mmcore.config import TrainConfig
from mmcore.constants import EXIT_BAD_AGAIN, EXIT_FAULT, EXIT_SUSPECT

# Norms that the median is taken of, and the fewest that make one worth comparing with.
WINDOW, FEWEST = 100, 10


class BadStepError(RuntimeError):
    """A step was bad and the run is not to go on.

    Args:
        code: exit code of the job.
    """

    def __init__(self, message: str, code: int = EXIT_FAULT) -> None:
        super().__init__(message)
        self.code = code


class BadSteps:
    """Judges every step before its update, and answers the bad ones; on all ranks alike."""

    def __init__(self, config: TrainConfig, norms: Iterable[float] = ()) -> None:
        """Begin, or go on.

        Args:
            norms: of the gradients before, as the attribute was when the checkpoint was written.
        """
        self.config = config
        self.norms = deque(norms, maxlen=WINDOW)
        self.in_a_row = self.rewinds = 0

    def fault(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step, from its loss and its gradient's norm before clipping; "" for a good one."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        if self.config.spike_factor and len(self.norms) >= FEWEST:
            median = statistics.median(self.norms)
            if grad_norm > self.config.spike_factor * median:
                return f"the gradient's norm is {grad_norm:.3g}, {grad_norm / median:.1f} times its running median"
        self.norms.append(grad_norm)
        self.in_a_row = 0
        return ""

    def answer(self, step: int, fault: str, checkpoint: Path | None) -> Literal["skip", "rewind"]:
        """What follows a bad step.

        Args:
            step: the bad one.
            checkpoint: of this run, the last.
        Raises:
            BadStepError: the run stops: it is told to, or has gone on too often, or has nothing to go back to.
        """
        kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint of this run yet"
        action, limit = self.config.on_bad_step, self.config.max_bad_steps
        if action == "stop":
            raise BadStepError(f"step {step} is bad: {fault}. Nothing of it was kept, and {kept}", EXIT_SUSPECT)
        if action == "rewind":
            self.rewinds += 1
            if checkpoint is None or self.rewinds > limit:
                if checkpoint is None:
                    raise BadStepError(f"step {step} is bad: {fault}; the run cannot go back, and {kept}", EXIT_SUSPECT)
                raise BadStepError(
                    f"step {step} is bad: {fault}; the run went back {limit} times already (--train.max-bad-steps), "
                    f"and {kept}. Lower --optimizer.lr",
                    EXIT_BAD_AGAIN,
                )
            return "rewind"
        self.in_a_row += 1
        if self.in_a_row > limit:
            raise BadStepError(
                f"step {step} is bad: {fault}; so were the {limit} before it (--train.max-bad-steps), and {kept}. "
                "Lower --optimizer.lr",
                EXIT_BAD_AGAIN,
            )
        return "skip"

    def saved(self) -> None:
        """A new checkpoint is there: rewinds are counted anew."""
        self.rewinds = 0
