"""Bad steps that end a job: whether it was the data and the model, or a machine that computed wrongly.

A step can be computed again, bit for bit, from the checkpoint before it. What is bad again is no fault of a machine;
what is good then was one. So the first time the job ends with code 16, and what started it is to start it again.

    RUN/suspect.json   steps that were bad and that no checkpoint has left behind: when, their samples and machines
"""

import contextlib
import json
import socket
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmcore import distributed
from mmcore.constants import EXIT_BAD_AGAIN, EXIT_SICK, EXIT_SUSPECT
from mmcore.data.batch import Batch
from mmcore.evaluation.scores import write_whole
from mmcore.training.policy import BadStepError

SUSPECT_FILE = "suspect.json"

# So many bad steps of jobs from one checkpoint, none of them twice, and there is no other try.
MOST_PLACES = 3


class Suspects:
    """Of a run. All ranks make one; the main rank's file counts."""

    def __init__(self, run: Path) -> None:
        self.path = run / SUSPECT_FILE
        self.places: list[dict[str, Any]] = []
        if distributed.is_main() and self.path.exists():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # then no step counts as one that was bad before
                self.places = list(json.loads(self.path.read_text())["places"])

    def judge(self, step: int, error: BadStepError, samples: Sequence[str], hosts: Sequence[str]) -> BadStepError:
        """What ends the job after a bad step; all ranks call it.

        Args:
            samples, hosts: of that step, on the main rank.
        """
        judged = [self._judge(step, error, samples, hosts) if distributed.is_main() else None]
        dist.broadcast_object_list(judged, 0)
        message, code = judged[0] or ("", 0)
        return BadStepError(message, code)

    def _judge(self, step: int, error: BadStepError, samples: Sequence[str], hosts: Sequence[str]) -> tuple[str, int]:
        known = [place for place in self.places if place["step"] == step and place["samples"] == sorted(samples)]
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        place = {"step": step, "time": time, "fault": str(error), "hosts": list(hosts), "samples": sorted(samples)}
        self.places = [other for other in self.places if other not in known] + [place]
        told = f"{error}. Its samples: {brief(samples)} ({self._write()})"
        if error.code != EXIT_SUSPECT:
            return told, error.code
        if known:
            advice = "look at its samples, lower --optimizer.lr, or go on past such steps with --train.on-bad-step skip"
            return f"{told}. It was bad in an earlier job too, so it is the data or the model: {advice}", EXIT_BAD_AGAIN
        if len(self.places) >= MOST_PLACES:
            steps = ", ".join(str(place["step"]) for place in self.places)
            return (
                f"{told}. Steps {steps} were bad in one job after the other, and none of them twice: a machine "
                f"computes wrongly, one of {', '.join(hosts)}"
            ), EXIT_SICK
        return f"{told}. Start the same command again: what is bad again is no fault of a machine", EXIT_SUSPECT

    def pass_by(self, step: int) -> str:
        """What to tell of a good step that was bad before, or ""."""
        for place in self.places:
            if place["step"] == step and not place.get("was_good_again"):
                place["was_good_again"] = True
                self._write()
                return (
                    f"step {step} was bad in an earlier job and is good: that was a machine, of {brief(place['hosts'])}"
                )
        return ""

    def saved(self, step: int) -> None:
        """Forget what a checkpoint after that step has left behind."""
        if self.places and all(place["step"] <= step for place in self.places):
            self.places = []
            self.path.unlink(missing_ok=True)

    def _write(self) -> str:
        """Where all is told."""
        try:
            write_whole(self.path, (json.dumps({"places": self.places}, indent=1) + "\n").encode())
        except ValueError as error:
            return str(error)
        return f"all are in {self.path}"


def gather_samples(batches: Sequence[Batch], bad: Sequence[int]) -> tuple[list[str], list[str]]:
    """Keys of the samples of a step and names of its machines, on the main rank; all ranks call it.

    Args:
        batches: of this replica's step.
        bad: those of them whose loss is not finite, where that is known. If any rank knows, theirs are meant alone.
    """
    own = (distributed.data_parallel_rank(), [batch.keys for batch in batches], list(bad), socket.gethostname())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, gathered if distributed.is_main() else None, 0)
    if not distributed.is_main():
        return [], []
    replicas = {replica: keys for replica, keys, _, _ in gathered}
    known = {(replica, index) for replica, _, found, _ in gathered for index in found}
    chosen = sorted(known) or [(replica, index) for replica in sorted(replicas) for index in range(len(batches))]
    samples = [key for replica, index in chosen for key in replicas[replica][index]]
    return samples, list(dict.fromkeys(host for *_, host in gathered))


def brief(names: Sequence[str], most: int = 8) -> str:
    """The first of them, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
