"""`mmcore prepare SOURCE --annotations FILE ... --images PLACE ... --output DIR`."""

import os
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

    Rows that cannot be used are left out, counted, and listed in OUTPUT/rejected.jsonl. A job that was
    interrupted goes on from its last finished shard when it is started again.
    """

    source: tyro.conf.Positional[Literal["llava-pretrain", "llava-instruct", "coco-captions", "mmc4", "jsonl"]]
    """Format of the annotations. llava-pretrain wants a picture in every row, llava-instruct does not;
    jsonl is the general one (see mmcore/data/sources/jsonl.py)."""
    annotations: tuple[Path, ...]
    """The data set's annotations, one file or several."""
    images: tuple[str, ...] = ()
    """Where its pictures lie: folders, zip or tar files, searched in order. PREFIX=PATH puts one below a
    folder: coco=train2017.zip holds coco/train2017/000000000009.jpg."""
    output: Path
    """Folder to write."""
    val_annotations: tuple[Path, ...] = ()
    """Annotations of the val split; none if left out."""
    samples_per_shard: int = 1000
    """Samples in one tar file."""
    overwrite: bool = False
    """Replace the output folder."""
    max_rejected: float = 0.01
    """Largest fraction of rows that may be left out; above it the job fails."""
    image_max_side: int | None = None
    """Shrink larger pictures to this many pixels on their longer side; others keep their own bytes."""
    image_quality: int = 90
    """JPEG quality of what --image-max-side shrinks, 1 to 100."""
    workers: int | None = None
    """Processes that read and check pictures; one for each CPU if left out."""

    def __post_init__(self) -> None:
        if self.samples_per_shard <= 0:
            raise ValueError(f"--samples-per-shard must be above 0, not {self.samples_per_shard}")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected is a fraction between 0 and 1, not {self.max_rejected}")
        if self.image_max_side is not None and self.image_max_side <= 0:
            raise ValueError(f"--image-max-side must be above 0, not {self.image_max_side}")
        if not 1 <= self.image_quality <= 100:
            raise ValueError(f"--image-quality must be from 1 to 100, not {self.image_quality}")
        if self.workers is not None and self.workers <= 0:
            raise ValueError(f"--workers must be above 0, not {self.workers}")


def main(argv: list[str]) -> int:
    config = tyro.cli(PrepareConfig, prog="mmcore prepare", args=argv)
    from concurrent.futures import BrokenExecutor

    from mmcore.data.sources.dataset import TooManyRejectedError

    try:
        report = prepare(config)
    except BrokenExecutor:
        print("mmcore prepare: a worker was killed, maybe for want of memory: try fewer --workers", file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt:
        print("mmcore prepare: interrupted; the same command goes on from the last finished shard", file=sys.stderr)
        return EXIT_FAULT
    except (OSError, TooManyRejectedError) as error:
        print(f"mmcore prepare: {error}", file=sys.stderr)
        return EXIT_FAULT
    show(report, config.output)
    return EXIT_DONE


def prepare(config: PrepareConfig) -> "Report":
    """Write the dataset, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from mmcore.data.shards import ShardWriter
    from mmcore.data.sources.dataset import SOURCES, fingerprint, write_dataset
    from mmcore.data.sources.images import open_images
    from mmcore.data.sources.picture import Shrink

    if SOURCES[config.source].needs_image and not config.images:
        raise ValueError(f"{config.source} wants pictures: say where they lie with --images")
    annotations = {"train": config.annotations}
    if config.val_annotations:
        annotations["val"] = config.val_annotations
    shrink = None
    if config.image_max_side is not None:
        shrink = Shrink(max_side=config.image_max_side, quality=config.image_quality)
    images = open_images(config.images)
    writer = ShardWriter(
        config.output,
        samples_per_shard=config.samples_per_shard,
        overwrite=config.overwrite,
        fingerprint=fingerprint(config.source, annotations, images, shrink),
    )
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("rows")
        return write_dataset(
            config.source,
            annotations,
            images,
            writer,
            max_rejected=config.max_rejected,
            shrink=shrink,
            workers=config.workers or len(os.sched_getaffinity(0)),
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def show(report: "Report", output: Path) -> None:
    """Print the summary."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for split, count in report.kept.items():
        table.add_row(f"kept, {split}", str(count))
    for reason, count in report.rejected.most_common():
        table.add_row(f"rejected, {reason}", str(count))
    for reason, count in report.dropped.most_common():
        table.add_row(f"pictures left out of documents, {reason}", str(count))
    if report.num_resumed:
        table.add_row("rows done by an earlier job", str(report.num_resumed))
    table.add_row("bytes", f"{report.num_bytes:,}")
    table.add_row("seconds", f"{report.seconds:.1f}")
    print(output)
    Console().print(table)
    if report.rejected or report.dropped:
        print(f"what was rejected, and why: {output}/rejected.jsonl")
