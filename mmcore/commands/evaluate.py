"""`mmcore evaluate TASK`: score predictions against references."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mmcore.constants import EXIT_DONE, EXIT_FAULT
from mmcore.evaluation.scores import EvaluationError, as_json, table, write_json
from mmcore.evaluation.task import TASKS, Tokenizer, check_task, load_task


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Score predictions against references. Exits with 1 where a score would be meaningless."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="{" + ",".join(TASKS) + "}")]
    """Benchmark whose rules count."""
    predictions: Path
    """JSON lines with id and answer, as mmcore generate writes them, or a COCO result list."""
    references: Path
    """The benchmark's own file."""
    output: Path | None = None
    """File for the scores, JSON; by default they are only printed."""
    tokenizer: Tokenizer = "auto"
    """How captions are cut into words: ptb (official, Java), python (close to it), none (they are cut already).
    auto is ptb where Java runs, else python."""

    def __post_init__(self) -> None:
        check_task(self.task)
        for name in ("predictions", "references"):
            if self.output and self.output.absolute() == getattr(self, name).absolute():
                raise ValueError(f"--output {self.output} would overwrite the {name}: give it another name")


def main(argv: list[str]) -> int:
    """Print the scores, and write them where they are wanted."""
    config = tyro.cli(EvaluateConfig, args=argv, prog="mmcore evaluate")
    try:
        scores = load_task(config.task).score(config.predictions, config.references, tokenizer=config.tokenizer)
    except EvaluationError as error:
        print(f"mmcore evaluate: {error}", file=sys.stderr)
        return EXIT_FAULT
    for note in scores.notes:
        print(f"mmcore evaluate: {note}", file=sys.stderr)
    from rich.console import Console

    Console().print(table(config.task, scores))
    if config.output:
        inputs = {"predictions": config.predictions, "references": config.references}
        write_json(config.output, as_json(config.task, scores, inputs))
    return EXIT_DONE
