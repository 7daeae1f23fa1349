"""What a run tells: a line that a person reads, JSONL that a program reads, TensorBoard and W&B if asked."""

import atexit
import json
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmcore import host
from mmcore.config import RunConfig
from mmcore.data.stream import Count
from mmcore.evaluation.scores import Scores, write_whole
from mmcore.training.loss import Share
from mmcore.training.speed import Speed
from mmcore.training.step import StepResult
from mmcore.training.writers import build_writers

VALIDATION_LOG, SCORES_LOG = "validation.jsonl", "scores.jsonl"


class Source(Protocol):
    """Where batches come from."""

    waited: float
    """Seconds that were spent waiting for them so far."""

    def counts(self) -> Mapping[str, Count]:
        """Of each source of the data, what was read so far."""


Validation = tuple[Share, dict[str, Share]]
"""In all, and of each source."""

# Columns of a line on the terminal: some 140 say how the run goes, losses by source get what is left.
WIDTH = 180


def is_told(config: RunConfig, first_step: int, step: int) -> bool:
    """Whether a step of a job that began after `first_step` has its line on the terminal."""
    return step % config.logging.log_interval == 0 or step in (first_step + 1, config.train.steps)


class Metrics:
    """Reports the steps of a run; on all ranks but the main one it is not made."""

    def __init__(self, config: RunConfig, first_step: int, speed: Speed | None = None) -> None:
        """Open the log.

        Args:
            speed: counts what steps do, where that is to be told.
            first_step: steps that are done already; later lines of an interrupted run are cut off.
        """
        self.config, self.first_step, self.speed = config, first_step, speed
        self.log = Path(config.checkpoint.save) / "log.jsonl"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.validation_log, self.scores_log = self.log.with_name(VALIDATION_LOG), self.log.with_name(SCORES_LOG)
        for log in (self.log, self.validation_log, self.scores_log):
            _keep_until(log, first_step)
        self.file = self.log.open("a", buffering=1)
        self.started = self.last = time.monotonic()
        self.left_out = self.told_at = 0.0
        self.samples = self.positions = 0
        self.waited = 0.0
        self.rewound = ""
        self.writers = build_writers(config, first_step)
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=config.train.steps, completed=first_step)
        self.bar.start()
        atexit.register(self.bar.stop)  # a fault or Ctrl-C ends the run without `close`: the cursor comes back then

    def report(
        self,
        step: int,
        result: StepResult,
        lr: float,
        batches: Source,
        module_seconds: Mapping[str, float] | None = None,
        most: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Tell one step.

        Args:
            step: the step just done, from 1.
            batches: where this rank's come from.
            module_seconds: where its time went, if that was watched.
            most: of a step that `is_told`, the most that any rank has held, in bytes, and waited for data since the
                last one, in seconds.
        """
        counts = batches.counts()
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        total = result.total
        self.samples += total.num_samples
        self.positions += total.num_positions
        skipped, cut = sum(count.skipped for count in counts.values()), sum(count.cut for count in counts.values())
        waited, self.waited = batches.waited - self.waited, batches.waited
        row: dict[str, Any] = {
            "step": step,
            **total.row(),
            "grad_norm": result.grad_norm,
            "lr": lr,
            "seconds": round(seconds, 4),
            "samples_per_s": round(total.num_samples / seconds, 2),
            "tokens_per_s": round(total.num_positions / seconds, 1),
            "trained_tokens_per_s": round(total.num_tokens / seconds, 1),
            "fill": round(total.num_positions / (self.config.train.batch_size(step) * self.config.data.seq_length), 4),
            "data_wait": round(waited / seconds, 4),
            "memory_gib": round(host.peak_memory() / 2**30, 3),
            "skipped": skipped,
            "cut": cut,
        }
        if self.speed:
            row |= self.speed.report(step, total.work, seconds, waited, total.num_samples)
        row |= {f"seconds/{name}": round(part, 5) for name, part in (module_seconds or {}).items()}
        if len(counts) > 1:
            row["sources"] = {
                name: {**share.row(), "skipped": count.skipped, "cut": count.cut}
                for (name, count), share in zip(counts.items(), result.sources, strict=True)
            }
        if result.fault or self.rewound:
            row["fault"], self.rewound = result.fault or self.rewound, ""
        self.file.write(json.dumps(row) + "\n")
        self._write(step, _numbers(row))
        self.bar.update(self.task, completed=step, description=f"loss {total.loss:.4f}")
        if is_told(self.config, self.first_step, step):
            first, done, all_rows = (
                self.config.train.rows_before(at + 1) for at in (self.first_step, step, self.config.train.steps)
            )
            left = timedelta(seconds=round((now - self.started) * (all_rows - done) / (done - first)))
            elapsed = now - self.started - self.left_out
            share, self.told_at = most[1] / (elapsed - self.told_at), elapsed
            fill = f" | fill {row['fill']:.0%}" if self.config.data.packing_buffer_size else ""
            note = "".join(f" | {name} {count}" for name, count in (("skipped", skipped), ("cut", cut)) if count)
            line = (
                f"step {step:>6}/{self.config.train.steps} | loss {total.loss:.4f} | "
                f"grad norm {result.grad_norm:.3f} | lr {lr:.2e} | {self.samples / elapsed:.1f} samples/s | "
                f"{self.positions / elapsed:,.0f} tokens/s{fill} | wait {share:.0%} | {most[0] / 2**30:.3g} GiB | "
                f"left {left}{note}"
            )
            self.say(line + _by_source(dict(zip(counts, result.sources, strict=False)), WIDTH - len(line)))

    def rewind(self, step: int, fault: str) -> None:
        """Forget what came after a step that the run goes back to; the next one's row says why."""
        self.file.close()
        for log in (self.log, self.validation_log, self.scores_log):
            _keep_until(log, step)
        self.file = self.log.open("a", buffering=1)
        self.rewound = f"went back to step {step}: {fault}"

    def has_validation(self, step: int) -> bool:
        """Whether the loss on the val split after a step is told already."""
        log = self.validation_log
        return log.exists() and any(json.loads(line)["step"] == step for line in log.read_text().splitlines())

    def report_validation(self, step: int, total: Share, sources: Mapping[str, Share]) -> None:
        """Tell the loss on the val split after a step."""
        self.leave_out()
        row: dict[str, Any] = {"step": step, **total.row()}
        if len(sources) > 1:
            row["sources"] = {name: share.row() for name, share in sources.items()}
        with self.validation_log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        losses = {f"validation_loss/{name}": share.loss for name, share in sources.items()}
        self._write(step, {"validation_loss": total.loss, **losses})
        self.say(f"step {step:>6}/{self.config.train.steps} | validation loss {total.loss:.4f}")

    def report_scores(self, step: int, task: str, metric: str, scores: Scores, *, is_best: bool = False) -> None:
        """Tell how a task's scorer judged the answers that the model gave after a step.

        Args:
            metric: the one that checkpoints are compared by.
            is_best: whether it is the best of the run so far.
        """
        row = {"step": step, "task": task, "num_samples": scores.size, "metrics": dict(scores.metrics)}
        with self.scores_log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._write(step, {f"scores/{name}": value for name, value in scores.metrics.items()})
        value = f"{scores.metrics[metric]:.4f}" if metric in scores.metrics else "-"
        best = ", the best so far" if is_best else ""
        self.say(f"step {step:>6}/{self.config.train.steps} | {task} {metric} {value} of {scores.size} samples{best}")

    def leave_out(self) -> None:
        """Count the time since the last step to no step, nor to the samples and tokens per second."""
        now = time.monotonic()
        self.left_out += now - self.last
        self.last = now

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.write(step, values)

    def say(self, text: str) -> None:
        """Tell something else."""
        self.bar.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self.bar.stop()
        self.file.close()
        for writer in self.writers:
            writer.close()


def _by_source(shares: Mapping[str, Share], width: int) -> str:
    """Losses of the sources that had a part in a step, as many as there is room for; none where there is one source."""
    parts = [f"{name[:16]} {share.loss:.2f}" for name, share in shares.items() if share.num_tokens]
    text, separator = "", " | "
    for part in parts if len(shares) > 1 else ():
        if len(text) + len(separator) + len(part) > width:
            return text
        text, separator = text + separator + part, ", "
    return text


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A step's row, flat; a source's loss only where it had a part in the step."""
    numbers = {name: value for name, value in row.items() if name not in ("step", "sources", "fault")}
    for source, share in row.get("sources", {}).items():
        for name, value in share.items():
            if name != "loss" or share["num_tokens"]:
                numbers[f"{name}/{source}"] = value
    return numbers


def _keep_until(log: Path, step: int) -> None:
    """Drop what a killed run logged after the checkpoint that this one starts from."""
    if log.exists():
        kept = [line for line in log.read_text().splitlines() if _is_until(line, step)]
        write_whole(log, "".join(line + "\n" for line in kept).encode())


def _is_until(line: str, step: int) -> bool:
    """Whether it is the row of a step up to that; a kill or a full disk can tear the last row."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:
        return False
