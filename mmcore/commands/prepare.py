"""`mmcore prepare SOURCE --annotations FILE --images DIR --output DIR`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mmcore.constants import EXIT_DONE, EXIT_FAULT

if TYPE_CHECKING:
    from mmcore.data.sources.dataset import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """Turn raw pictures and conversations into an energon dataset, whole or not at all.

    Rows that cannot be used are left out, counted, and listed in OUTPUT/rejected.jsonl.
    """

    source: tyro.conf.Positional[Literal["llava-pretrain", "llava-instruct", "coco-captions"]]
    """Format of the annotations. llava-pretrain wants a picture in every row, llava-instruct does not."""
    annotations: Path
    """The data set's annotations file, JSON."""
    images: Path
    """Folder that its pictures' paths start from."""
    output: Path
    """Folder to write."""
    val_annotations: Path | None = None
    """Annotations of the val split; none if left out."""
    samples_per_shard: int = 1000
    """Samples in one tar file."""
    overwrite: bool = False
    """Replace the output folder."""
    max_rejected: float = 0.01
    """Largest fraction of rows that may be left out; above it the job fails."""

    def __post_init__(self) -> None:
        if self.samples_per_shard <= 0:
            raise ValueError(f"--samples-per-shard must be above 0, not {self.samples_per_shard}")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected is a fraction between 0 and 1, not {self.max_rejected}")


def main(argv: list[str]) -> int:
    config = tyro.cli(PrepareConfig, prog="mmcore prepare", args=argv)
    from rich.console import Console
    from rich.progress import Progress

    from mmcore.data.shards import ShardWriter
    from mmcore.data.sources.dataset import TooManyRejectedError, write_dataset

    annotations = {"train": config.annotations}
    if config.val_annotations:
        annotations["val"] = config.val_annotations
    writer = ShardWriter(config.output, samples_per_shard=config.samples_per_shard, overwrite=config.overwrite)
    console = Console(stderr=True)
    try:
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("rows")
            report = write_dataset(
                config.source,
                annotations,
                config.images,
                writer,
                max_rejected=config.max_rejected,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except (OSError, TooManyRejectedError) as error:
        print(f"mmcore prepare: {error}", file=sys.stderr)
        return EXIT_FAULT
    show(report, config.output)
    return EXIT_DONE


def show(report: "Report", output: Path) -> None:
    """Print the summary."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for split, count in report.kept.items():
        table.add_row(f"kept, {split}", str(count))
    for reason, count in report.rejected.most_common():
        table.add_row(f"rejected, {reason}", str(count))
    table.add_row("bytes", f"{report.num_bytes:,}")
    table.add_row("seconds", f"{report.seconds:.1f}")
    print(output)
    Console().print(table)
    if report.rejected:
        print(f"what was rejected, and why: {output}/rejected.jsonl")
