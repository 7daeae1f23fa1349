"""Raw annotations and pictures to an energon dataset."""

import importlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mmcore.data.shards import ShardWriter
from mmcore.data.sources.row import RejectedRowError, Row, sample_parts

REJECTED_FILE = "rejected.jsonl"
KEY_WIDTH = 8
READ_AHEAD = 64  # rows whose pictures are in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    module: str
    """Has `read_rows(path) -> list[Row]`."""
    needs_image: bool


SOURCES = {
    "llava-pretrain": Source(module="mmcore.data.sources.llava", needs_image=True),
    "llava-instruct": Source(module="mmcore.data.sources.llava", needs_image=False),
    "coco-captions": Source(module="mmcore.data.sources.coco", needs_image=True),
}


class TooManyRejectedError(Exception):
    """More rows cannot be used than the user allowed; no dataset was written."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What became of the rows."""

    kept: Counter[str] = field(default_factory=Counter)
    """Samples of each split."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows by the reason that they were left out for."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of each reason."""
    num_bytes: int = 0
    seconds: float = 0.0


def write_dataset(
    source: str,
    annotations: dict[str, Path],
    images: Path,
    writer: ShardWriter,
    *,
    max_rejected: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write all rows that can be used, in order, and list the others in rejected.jsonl.

    Args:
        source: a name in SOURCES.
        annotations: file of each split.
        images: folder of the pictures.
        writer: not yet entered; leaves nothing behind when this fails.
        max_rejected: largest fraction of rows that may be left out.
        on_progress: told how many rows are done, and how many there are.
    Raises:
        ValueError: a file is not in the source's format, or the folder of pictures is missing.
        TooManyRejectedError: see max_rejected, or nothing is left.
    """
    started, report = time.monotonic(), Report()
    if not images.is_dir():
        raise ValueError(f"{images} is no folder: --images names the one that the pictures lie in")
    module = importlib.import_module(SOURCES[source].module)
    rows = [(split, row) for split, path in annotations.items() for row in module.read_rows(path)]
    load = partial(_load, images=images, needs_image=SOURCES[source].needs_image)
    with writer, (writer.folder / REJECTED_FILE).open("w", encoding="utf-8") as rejected:
        for number, ((split, row), parts) in enumerate(zip(rows, _ahead(load, [row for _, row in rows]), strict=True)):
            if isinstance(parts, RejectedRowError):
                report.rejected[parts.reason] += 1
                report.examples.setdefault(parts.reason, f"row {row.number} of {row.file}: {parts.detail}")
                entry = {"file": str(row.file), "row": row.number, "id": row.id}
                rejected.write(json.dumps({**entry, "reason": parts.reason, "detail": parts.detail}) + "\n")
            else:
                writer.write(split, f"{number:0{KEY_WIDTH}d}", parts)
                report.kept[split] += 1
                report.num_bytes += sum(map(len, parts.values()))
            on_progress(number + 1, len(rows))
        _check(report, annotations, max_rejected)
    report.seconds = time.monotonic() - started
    return report


def _load(row: Row, *, images: Path, needs_image: bool) -> dict[str, bytes] | RejectedRowError:
    try:
        return sample_parts(row, images, needs_image=needs_image)
    except RejectedRowError as rejected:
        return rejected


def _ahead(
    load: Callable[[Row], dict[str, bytes] | RejectedRowError], rows: Sequence[Row]
) -> Iterator[dict[str, bytes] | RejectedRowError]:
    """Load in threads (reading waits for disks, decoding lets go of the interpreter), in order."""
    remaining = iter(rows)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(itertools.islice(remaining, READ_AHEAD)):
            yield from pool.map(load, chunk)


def _check(report: Report, annotations: dict[str, Path], max_rejected: float) -> None:
    rejected, kept = report.rejected.total(), report.kept.total()
    reasons = "; ".join(f"{count} {why} ({report.examples[why]})" for why, count in report.rejected.most_common())
    if rejected > max_rejected * (rejected + kept):
        raise TooManyRejectedError(
            f"{rejected} of {rejected + kept} rows cannot be used, more "
            f"than --max-rejected {max_rejected:g} allows: {reasons}. Nothing was written"
        )
    if empty := [split for split in annotations if not report.kept[split]]:
        raise TooManyRejectedError(
            f"no row of {annotations[empty[0]]} is left for the split {empty[0]}{f': {reasons}' if reasons else ''}. "
            "Nothing was written"
        )
