"""`mmcore report RUN...`: a page that sets scored runs side by side, any number of them."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mmcore.constants import EXIT_DONE
from mmcore.evaluation.scored_compare import Comparison, compare
from mmcore.evaluation.scored_page import scored_page
from mmcore.evaluation.scored_parts import between, scale_of, size_of, value_of
from mmcore.evaluation.scored_run import ScoredRun, beside, read_runs, scores_files, with_pictures
from mmcore.evaluation.scores import shown, write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """Set runs that mmcore evaluate has scored side by side: scores with intervals, paired tests, samples."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """What --output of mmcore evaluate named, or the folder that holds scores.json; best the baseline first."""
    output: Path
    """File for the page, HTML."""
    gallery: int = 240
    """Samples to look at, of each task; those in which runs differ come first. Their pictures make the page large."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("give the runs: scores.json of mmcore evaluate, or folders that hold one")
        if self.gallery < 0:
            raise ValueError(f"--gallery must not be negative, but is {self.gallery}")


def main(argv: list[str]) -> int:
    """Write the page, and print the scores and what the tests say."""
    config = tyro.cli(ReportConfig, args=argv, prog="mmcore report")
    files = scores_files(config.runs)
    if config.output.absolute() in {path.absolute() for file in files for path in (file, *beside(file))}:
        raise ValueError(f"--output {config.output} would overwrite a run's own file: give it another name")
    tasks: dict[str, list[ScoredRun]] = {}
    for run in read_runs(files):
        tasks.setdefault(run.task, []).append(run)
    found = {task: compare(*with_pictures(runs)) for task, runs in tasks.items()}
    title = next(iter(tasks)) if len(tasks) == 1 else f"{len(files)} runs"
    write_whole(config.output, scored_page(title, found, config.gallery))
    for task, comparison in found.items():
        _print(task, comparison)
    print(config.output)
    return EXIT_DONE


def _print(task: str, found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metric = found.runs[0].content["metric"]
    scale = scale_of(found.runs[0], metric)
    table = Table(title=Text(f"{task}: {metric}"), title_justify="left")
    for name in ("run", "score", "95 %", "samples"):
        table.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
    for run in found.runs:
        table.add_row(Text(run.name), value_of(run, metric), between(run, metric), size_of(run))
    Console().print(table)
    for row in found.differences:
        ends = " to ".join(shown(end, scale) for end in row.interval or ())
        print(f"{row.second} less {row.first}: {shown(row.value, scale)} ({ends}), p = {row.p_value:.4f}")
    for text in found.contrasts:
        print(f"mmcore report: {text}", file=sys.stderr)
