"""What an evaluation says: numbers, how many samples they stand for, and what was left out of them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


class EvaluationError(Exception):
    """A score would be meaningless, or its scorer failed: nothing is written, the exit code is 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Result of one task on one file of predictions."""

    score: float
    """The number that the task is known by, one of `metrics`."""
    num_samples: int
    num_correct: int | None = None
    """Samples that are right, where a sample is right or wrong."""
    num_empty: int = 0
    """Answers without text; they are scored like any other."""
    metrics: Mapping[str, float]
    scales: Mapping[str, str]
    """What each metric can be, such as "0 to 1" or "percent"."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """What could not be computed, and why."""
    scorer: Mapping[str, str] = field(default_factory=dict)
    """Names and versions of what computed the metrics."""
    notes: tuple[str, ...] = ()
    """What a reader has to know to take the numbers for what they are."""


def as_json(task: str, scores: Scores, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Content of scores.json.

    Args:
        task: its name on the command line.
        inputs: role ("predictions", "references") to file; they are hashed.
    """
    correct = {} if scores.num_correct is None else {"num_correct": scores.num_correct}
    return {
        "task": task,
        "score": scores.score,
        "num_samples": scores.num_samples,
        **correct,
        "num_empty": scores.num_empty,
        "metrics": dict(scores.metrics),
        "scales": dict(scores.scales),
        "skipped": dict(scores.skipped),
        "notes": list(scores.notes),
        "scorer": dict(scores.scorer),
        "inputs": {role: {"file": path.name, "sha256": sha256(path)} for role, path in inputs.items()},
    }


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `path` whole or not at all."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all; its folder is made.

    Raises:
        ValueError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None


def table(task: str, scores: Scores) -> "Table":
    """The scores for a terminal."""
    from rich.table import Table

    rows = Table()
    rows.add_column(task)
    rows.add_column("value", justify="right")
    rows.add_column("scale", style="dim")
    for name, value in scores.metrics.items():
        rows.add_row(name, f"{value:.2f}" if scores.scales[name] == "percent" else f"{value:.4f}", scores.scales[name])
    for name in scores.skipped:
        rows.add_row(name, "-", "left out, see above", style="dim")
    rows.add_section()
    rows.add_row("samples", str(scores.num_samples))
    if scores.num_correct is not None:
        rows.add_row("right", str(scores.num_correct))
    return rows
