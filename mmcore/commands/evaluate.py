"""`mmcore evaluate TASK`: score predictions against references."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mmcore.constants import EXIT_DONE, EXIT_FAULT
from mmcore.evaluation.scores import EvaluationError, as_json, table, write_json
from mmcore.evaluation.task import TASKS, check_task, load_task, read_options


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Score predictions against references. Exits with 1 where a score would be meaningless."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="{" + ",".join(TASKS) + "}")]
    """Benchmark whose rules count."""
    predictions: Path
    """What mmcore generate wrote, or the benchmark's own format: a file, or a folder of them."""
    references: Path
    """The benchmark's own file."""
    output: Path | None = None
    """File for the scores, JSON; by default they are only printed. Beside it appear the page report.html and
    samples.jsonl, what was made of every answer (of any other name than scores.json: NAME.report.html and so on)."""
    images: Path | None = None
    """Folder of the pictures, for the page; by default `images` beside the references, or their folder."""
    options: tuple[str, ...] = ()
    """Deviations from the official rules, as name=value; what a task has is told for a wrong one."""
    submission: Path | None = None
    """Write what the benchmark's server takes, and score nothing: for splits whose answers are not public."""
    tokenizer: str = ""
    """The same as --options tokenizer=..., of captions: ptb (official, Java), python (close to it), none (they are cut
    already). auto, the default, is ptb where Java runs, else python."""

    def __post_init__(self) -> None:
        check_task(self.task)
        for name in ("predictions", "references"):
            for option in ("output", "submission"):
                given = getattr(self, option)
                if given and given.absolute() == getattr(self, name).absolute():
                    raise ValueError(f"--{option} {given} would overwrite the {name}: give it another name")


def main(argv: list[str]) -> int:
    """Print the scores, and write them where they are wanted."""
    config = tyro.cli(EvaluateConfig, args=argv, prog="mmcore evaluate")
    given = (*config.options, *([f"tokenizer={config.tokenizer}"] if config.tokenizer else []))
    options, task = read_options(config.task, given), load_task(config.task)
    try:
        if config.submission:
            write = getattr(task, "submission", None)
            if write is None:
                raise ValueError(f"--submission: {config.task} has no server that takes files")
            write(config.predictions, config.references, config.submission, options)
            print(f"{config.submission}: for the server of {config.task}")
            return EXIT_DONE
        scores = task.score(config.predictions, config.references, options=options)
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
