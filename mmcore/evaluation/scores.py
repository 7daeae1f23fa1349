"""What an evaluation says: numbers, how many samples they stand for, and what was left out of them."""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcore.evaluation.confidence import Statistic, interval

if TYPE_CHECKING:
    from rich.table import Table


class EvaluationError(Exception):
    """A score would be meaningless, or its scorer failed: nothing is written, the exit code is 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was made of one answer."""

    id: str
    score: float
    """What it adds to the mean that the task is known by, or comes closest to that: 1 for right, 0 for wrong."""
    answer: str
    """As the model gave it."""
    parsed: str = ""
    """What the rule read in it, where that is not the answer itself; "" where it could read nothing."""
    references: tuple[str, ...] = ()
    """What is right."""
    group: str = ""
    """Subject, category or kind of question, where the benchmark tells them apart."""
    prompt: str = ""
    """What was asked; where it is known, `mmcore.evaluation.scored_run` fills it in, and the pictures."""
    images: tuple[Path | bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A part of the benchmark that is scored by itself."""

    score: float
    """On the scale of the task's metric."""
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Result of one task on one file of predictions."""

    metric: str
    """The number that the task is known by, one of `metrics`."""
    metrics: Mapping[str, float]
    scales: Mapping[str, str]
    """What each metric can be, such as "0 to 1" or "percent"."""
    samples: Sequence[Sample]
    """In the order of the references."""
    num_samples: int | None = None
    """That the metric is over, where these are not `samples` one by one (questions asked in several orders)."""
    num_correct: int | None = None
    """Likewise; by default the samples whose score is 1, where a sample is right or wrong."""
    is_right_or_wrong: bool = False
    """Whether every sample is."""
    groups: Mapping[str, Mapping[str, Group]] = field(default_factory=dict)
    """By kind, such as "subject", and by name."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What is not as it should be, by name: empty, missing, unparsed, fallback, repeated ..., also where it is 0."""
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    """Of metrics whose chance can be told."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """What could not be computed, and why."""
    scorer: Mapping[str, str] = field(default_factory=dict)
    """Names and versions of what computed the metrics, and the options that were chosen."""
    notes: tuple[str, ...] = ()
    """What a reader has to know to take the numbers for what they are."""

    @property
    def score(self) -> float:
        return self.metrics[self.metric]

    @property
    def size(self) -> int:
        """What the metric is over."""
        return len(self.samples) if self.num_samples is None else self.num_samples

    @property
    def correct(self) -> int | None:
        """Of them right; None where nothing is right or wrong."""
        if self.num_correct is None and self.is_right_or_wrong:
            return sum(sample.score == 1 for sample in self.samples)
        return self.num_correct

    def intervals(self) -> dict[str, tuple[float, float]]:
        """See `mmcore.evaluation.confidence.interval`; of a single sample there is none."""
        drawn = {name: interval(statistic) for name, statistic in self.statistics.items() if len(statistic.rows) > 1}
        return {name: pair for name, pair in drawn.items() if pair is not None}


def as_json(task: str, scores: Scores, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Content of scores.json.

    Args:
        task: its name on the command line.
        inputs: role ("predictions", "references") to file or folder; they are hashed.
    """
    correct = {} if scores.correct is None else {"num_correct": scores.correct}
    return {
        "task": task,
        "score": scores.score,
        "num_samples": scores.size,
        **correct,
        "metric": scores.metric,
        "metrics": dict(scores.metrics),
        "intervals": {name: list(pair) for name, pair in scores.intervals().items()},
        "scales": dict(scores.scales),
        "groups": {kind: {name: asdict(group) for name, group in row.items()} for kind, row in scores.groups.items()},
        "counts": dict(scores.counts),
        "skipped": dict(scores.skipped),
        "notes": list(scores.notes),
        "scorer": {"mmcore": metadata.version("mmcore"), **scores.scorer},
        "inputs": {role: {"file": path.name, "sha256": sha256(path)} for role, path in inputs.items()},
    }


def sha256(path: Path) -> str:
    """Hex digest of a file; of a folder that of all its files' names and digests."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
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
    write_together({path: content})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write all files or none, each whole; their folders are made. The last one gets its name last.

    Raises:
        ValueError: one cannot be written.
    """
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    path = Path()
    try:
        try:
            for path, part in parts.items():
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(files[path])
            for path, part in parts.items():
                part.replace(path)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None


def best(scale: str) -> float:
    """What no value on it is above; infinite where the scale does not say so."""
    if scale.startswith("percent"):
        return 100.0
    found = re.match(r"0 to ([\d.]+)", scale)
    return float(found[1]) if found else math.inf


def shown(value: float, scale: str) -> str:
    """A metric as people write it."""
    return f"{value:.4f}" if best(scale) <= 10 else f"{value:.2f}"


def table(content: Mapping[str, Any]) -> "Table":
    """Content of scores.json for a terminal."""
    from rich.table import Table

    rows = Table()
    rows.add_column(content["task"])
    rows.add_column("value", justify="right")
    rows.add_column("95 %", justify="right")
    rows.add_column("scale", style="dim")
    for name, value in content["metrics"].items():
        scale, ends = content["scales"][name], content["intervals"].get(name, ())
        rows.add_row(name, shown(value, scale), " to ".join(shown(end, scale) for end in ends), scale)
    for name in content["skipped"]:
        rows.add_row(name, "-", "", "left out, see above", style="dim")
    rows.add_section()
    rows.add_row("samples", str(content["num_samples"]))
    if "num_correct" in content:
        rows.add_row("right", str(content["num_correct"]))
    for name, count in content["counts"].items():
        if count:
            rows.add_row(name, str(count))
    return rows
