"""What a run has left in its folder about itself, as a report reads it: no torch, no checkpoint opened.

log.jsonl         a row for each step
validation.jsonl  a row for each loss on the val split
scores.jsonl      a row for each scoring
starts.jsonl      a row for each job, with its configuration
step_*            checkpoints
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmcore.checkpoint_files import step_folders
from mmcore.config import RunConfig

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Rows by rising step."""

    name: str
    """Of the folder."""
    steps: Sequence[Row]
    """One at least."""
    validation: Sequence[Row]
    scores: Sequence[Row]
    starts: Sequence[Row]
    """Of each job that trained, the first first; without what a full disk has torn."""
    checkpoints: Sequence[str]

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the last job, as nested mappings; empty where none has said it."""
        return self.starts[-1]["config"] if self.starts else {}

    @property
    def num_steps(self) -> int:
        """Of the whole run, as far as it is known."""
        return int(self.config["train"]["steps"]) if self.config else int(self.steps[-1]["step"])


def read_run(run: Path) -> RunRecord:
    """Read a run's files.

    Raises:
        ValueError: there is no step in its log, or a file is not what the trainer writes.
    """
    steps = rows_by_step(run / "log.jsonl")
    if not steps:
        raise ValueError(f"{run / 'log.jsonl'} has no step to tell of")
    validation, scores, starts = (run / f"{name}.jsonl" for name in ("validation", "scores", "starts"))
    return RunRecord(
        name=run.absolute().name,
        steps=steps,
        validation=rows_by_step(validation) if validation.exists() else [],
        scores=rows_by_step(scores) if scores.exists() else [],
        starts=read_rows(starts, []) if starts.exists() else [],
        checkpoints=[folder.name for folder in step_folders(run)],
    )


def read_rows(path: Path, torn: list[str] | None = None) -> list[Row]:
    """One for each line; the last may be torn, as a kill leaves it.

    Args:
        torn: to which the names of other lines that are no rows are added; if None they are errors.
    Raises:
        ValueError: as of `rows_by_step`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), **row})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines) and torn is not None:
                torn.append(f"{path.name} line {number}")
            elif number < len(lines):
                raise ValueError(f"{path} line {number} is not a row of a run: {error}") from None
    return rows


def rows_by_step(path: Path) -> list[Row]:
    """Rows of log.jsonl or one like it, by rising step: the later one counts where a run came by twice.

    Raises:
        ValueError: the file cannot be read, or a line but the last is no object with a step.
    """
    return [row for _, row in sorted({(row["step"], row.get("task", "")): row for row in read_rows(path)}.items())]


def values(rows: Sequence[Row], *names: str) -> list[float]:
    """A number of each row; not a number where it has none.

    Args:
        names: the way to it through nested mappings.
    """
    found = []
    for row in rows:
        value: Any = row
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        found.append(float(value) if isinstance(value, (int, float)) else math.nan)
    return found


def total(rows: Sequence[Row], name: str) -> float:
    """Sum over the rows that have it."""
    return math.fsum(value for value in values(rows, name) if math.isfinite(value))


def mean(numbers: Sequence[float]) -> float:
    """Of those that are finite; not a number if none is."""
    finite = [number for number in numbers if math.isfinite(number)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def changed_options(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options that are not what they are without a recipe, as the command line takes them; stages are left out."""
    found = []
    for section, defaults in asdict(RunConfig()).items():
        for name, value in config.get(section, {}).items():
            default = defaults.get(name)
            default = list(default) if isinstance(default, tuple) else default
            value = list(value) if isinstance(value, tuple) else value
            if value != default and (section, name) != ("train", "stages"):
                text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
                found.append((f"--{section}.{name.replace('_', '-')}", text))
    return found


def stages(record: RunRecord) -> Sequence[Row]:
    """Those that are planned, as the configuration has them; one of a run without stages, none where it is unknown."""
    if not record.config:
        return []
    whole = {"name": "whole run", "until": 0, "freeze": record.config["model"]["freeze"], "lr": 0.0}
    return record.config["train"]["stages"] or [whole]
