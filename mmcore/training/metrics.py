"""What a run tells: a line that a person reads, JSONL that a program reads, TensorBoard if asked."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmcore import host
from mmcore.config import RunConfig
from mmcore.data.stream import Count
from mmcore.training.loss import Share
from mmcore.training.step import StepResult


class Source(Protocol):
    """Where batches come from."""

    waited: float
    """Seconds that were spent waiting for them so far."""

    def counts(self) -> Mapping[str, Count]:
        """Of each source of the data, what was read so far."""


Validation = tuple[Share, dict[str, Share]]
"""In all, and of each source."""


class Metrics:
    """Reports the steps of a run; on all ranks but the main one it is not made."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        """Open the log.

        Args:
            first_step: steps that are done already; later lines of an interrupted run are cut off.
        """
        self.config, self.first_step = config, first_step
        self.log = Path(config.checkpoint.save) / "log.jsonl"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.validation_log = self.log.with_name("validation.jsonl")
        for log in (self.log, self.validation_log):
            _keep_until(log, first_step)
        self.file = self.log.open("a", buffering=1)
        self.started = self.last = time.monotonic()
        self.samples = self.positions = 0
        self.waited = 0.0
        self.rewound = ""
        self.writer: Any = None
        if config.logging.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(config.logging.tensorboard_dir, purge_step=first_step)
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

    def report(self, step: int, result: StepResult, lr: float, batches: Source) -> None:
        """Tell one step.

        Args:
            step: the step just done, from 1.
            batches: where this rank's come from.
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
            **asdict(total),
            "grad_norm": result.grad_norm,
            "lr": lr,
            "seconds": round(seconds, 4),
            "samples_per_s": round(total.num_samples / seconds, 2),
            "tokens_per_s": round(total.num_positions / seconds, 1),
            "trained_tokens_per_s": round(total.num_tokens / seconds, 1),
            "fill": round(total.num_positions / (self.config.train.global_batch_size * self.config.data.seq_length), 4),
            "data_wait": round(waited / seconds, 4),
            "memory_gib": round(host.peak_memory() / 2**30, 3),
            "skipped": skipped,
            "cut": cut,
        }
        if len(counts) > 1:
            row["sources"] = {
                name: {**asdict(share), "skipped": count.skipped, "cut": count.cut}
                for (name, count), share in zip(counts.items(), result.sources, strict=True)
            }
        if result.fault or self.rewound:
            row["fault"], self.rewound = result.fault or self.rewound, ""
        self.file.write(json.dumps(row) + "\n")
        if self.writer:
            self._draw(step, row)
        self.bar.update(self.task, completed=step, description=f"loss {total.loss:.4f}")
        if step % self.config.logging.log_interval == 0 or step in (self.first_step + 1, self.config.train.steps):
            mean = (now - self.started) / (step - self.first_step)
            left = timedelta(seconds=round(mean * (self.config.train.steps - step)))
            note = "".join(f" | {name} {count}" for name, count in (("skipped", skipped), ("cut", cut)) if count)
            elapsed = now - self.started
            self.say(
                f"step {step:>6}/{self.config.train.steps} | loss {total.loss:.4f} | "
                f"grad norm {result.grad_norm:.3f} | lr {lr:.2e} | {self.samples / elapsed:.1f} samples/s | "
                f"{self.positions / elapsed:,.0f} tokens/s | left {left}{note}"
            )

    def rewind(self, step: int, fault: str) -> None:
        """Forget what came after a step that the run goes back to; the next one's row says why."""
        self.file.close()
        for log in (self.log, self.validation_log):
            _keep_until(log, step)
        self.file = self.log.open("a", buffering=1)
        self.rewound = f"went back to step {step}: {fault}"

    def report_validation(self, step: int, total: Share, sources: Mapping[str, Share]) -> None:
        """Tell the loss on the val split after a step."""
        self.last = time.monotonic()  # the next step has no part in it
        row: dict[str, Any] = {"step": step, **asdict(total)}
        if len(sources) > 1:
            row["sources"] = {name: asdict(share) for name, share in sources.items()}
        with self.validation_log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.writer:
            self.writer.add_scalar("validation_loss", total.loss, step)
            for name, share in sources.items():
                self.writer.add_scalar(f"validation_loss/{name}", share.loss, step)
        self.say(f"step {step:>6}/{self.config.train.steps} | validation loss {total.loss:.4f}")

    def _draw(self, step: int, row: dict[str, Any]) -> None:
        """Give a step's numbers to TensorBoard; a source's loss only where it had a part in the step."""
        for name, value in row.items():
            if name not in ("sources", "fault"):
                self.writer.add_scalar(name, value, step)
        for source, share in row.get("sources", {}).items():
            for name, value in share.items():
                if name != "loss" or share["num_tokens"]:
                    self.writer.add_scalar(f"{name}/{source}", value, step)

    def say(self, text: str) -> None:
        """Tell something else."""
        self.bar.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self.bar.stop()
        self.file.close()
        if self.writer:
            self.writer.close()


def _keep_until(log: Path, step: int) -> None:
    """Drop what a killed run logged after the checkpoint that this one starts from."""
    if log.exists():
        lines = log.read_text().splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in kept))
