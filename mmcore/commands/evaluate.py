"""`mmcore evaluate TASK`: score predictions against references."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmcore.constants import EXIT_DONE, EXIT_FAULT
from mmcore.evaluation.scored_compare import compare
from mmcore.evaluation.scored_page import scored_page
from mmcore.evaluation.scored_run import ScoredRun, beside, load_prompts, samples_file, with_questions
from mmcore.evaluation.scores import EvaluationError, Scores, as_json, table, write_together
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
    gallery: int = 240
    """Samples to look at in the page, by chance, as many right as wrong; their pictures make it large."""
    options: tuple[str, ...] = ()
    """Deviations from the official rules, as name=value; what a task has is told for a wrong one."""
    submission: Path | None = None
    """Write what the benchmark's server takes, and score nothing: for splits whose answers are not public."""
    tokenizer: str = ""
    """The same as --options tokenizer=..., of captions: ptb (official, Java), python (close to it), none (they are cut
    already). auto, the default, is ptb where Java runs, else python."""

    def __post_init__(self) -> None:
        check_task(self.task)
        if self.gallery < 0:
            raise ValueError(f"--gallery must not be negative, but is {self.gallery}")
        written = {
            "output": [self.output, *beside(self.output)] if self.output else [],
            "submission": [self.submission] if self.submission else [],
        }
        for name in ("predictions", "references"):
            for option, paths in written.items():
                if getattr(self, name).absolute() in [path.absolute() for path in paths]:
                    raise ValueError(
                        f"--{option} {getattr(self, option)} would overwrite the {name} {getattr(self, name)}: give it "
                        "another name"
                    )


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

    inputs = {"predictions": config.predictions, "references": config.references}
    content = as_json(config.task, scores, inputs)
    Console().print(table(content))
    if config.output:
        _write(config, config.output, options, scores, content)
    return EXIT_DONE


def _write(
    config: EvaluateConfig, output: Path, options: Mapping[str, str], scores: Scores, content: Mapping[str, Any]
) -> None:
    """Write scores, samples and page, all or none."""
    samples_path, page_path = beside(output)
    prompts = load_prompts(config.predictions)
    samples, problem = with_questions(config.task, scores.samples, config.references, config.images, options, prompts)
    rows = samples_file(samples)
    content = {
        **content,
        "samples": {"file": samples_path.name, "sha256": hashlib.sha256(rows).hexdigest()},
        "examples": {
            "data": str(config.references.absolute()),
            "images": str(config.images.absolute()) if config.images else None,
            "options": options,
        },
    }
    run = ScoredRun(name=output.stem, content=content, samples={sample.id: sample for sample in samples})
    page = scored_page(config.task, {config.task: compare([run], problem)}, config.gallery)
    write_together({samples_path: rows, page_path: page, output: (json.dumps(content, indent=2) + "\n").encode()})
    if problem:
        print(f"mmcore evaluate: {page_path} has no pictures: {problem}", file=sys.stderr)
