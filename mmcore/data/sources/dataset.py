"""Raw annotations and pictures to an energon dataset."""

import hashlib
import importlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mmcore.data.shards import ShardWriter
from mmcore.data.sources.images import ImageStore
from mmcore.data.sources.picture import Shrink
from mmcore.data.sources.row import RejectedRowError, Row, file_sha256
from mmcore.data.sources.sample import Reader, Sample
from mmcore.data.sources.workers import map_in_order

REJECTED_FILE = "rejected.jsonl"
KEY_WIDTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    module: str
    """Has `read_rows(path) -> list[Row]`."""
    needs_image: bool = False
    drops_pictures: bool = False
    """Whether a document may lose single pictures."""


SOURCES = {
    "llava-pretrain": Source(module="mmcore.data.sources.llava", needs_image=True),
    "llava-instruct": Source(module="mmcore.data.sources.llava"),
    "coco-captions": Source(module="mmcore.data.sources.coco", needs_image=True),
    "mmc4": Source(module="mmcore.data.sources.mmc4", needs_image=True, drops_pictures=True),
    "jsonl": Source(module="mmcore.data.sources.jsonl"),
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
    dropped: Counter[str] = field(default_factory=Counter)
    """Pictures that documents go without, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of each reason."""
    num_bytes: int = 0
    num_rows: int = 0
    num_resumed: int = 0
    """Rows that an earlier, interrupted job had done."""
    seconds: float = 0.0

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> "Report":
        """From `state`."""
        return cls(
            kept=Counter(state["kept"]),
            rejected=Counter(state["rejected"]),
            dropped=Counter(state["dropped"]),
            examples=dict(state["examples"]),
            num_bytes=state["num_bytes"],
            num_rows=state["num_rows"],
            num_resumed=state["num_rows"],
        )

    def state(self) -> dict[str, Any]:
        """What `load` reads, for JSON."""
        names = ("kept", "rejected", "dropped", "examples", "num_bytes", "num_rows")
        return {name: getattr(self, name) for name in names}


def fingerprint(
    source: str, annotations: Mapping[str, Sequence[Path]], images: ImageStore, shrink: Shrink | None
) -> str:
    """What a dataset's bytes follow from: jobs that share it can continue one another.

    Of places for pictures only the path, the size and the time of the last change are looked at.

    Raises:
        ValueError: annotations cannot be read.
    """
    import PIL

    files = {split: [(str(path), file_sha256(path)) for path in paths] for split, paths in annotations.items()}
    places = []
    for mount in images.mounts:
        path = mount.place.path.resolve()
        changed = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        places.append((str(mount.prefix), str(path), changed))
    text = json.dumps([source, files, places, repr(shrink), PIL.__version__])
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def write_dataset(
    source: str,
    annotations: Mapping[str, Sequence[Path]],
    images: ImageStore,
    writer: ShardWriter,
    *,
    max_rejected: float,
    shrink: Shrink | None = None,
    workers: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write all rows that can be used, in order, and list the others in rejected.jsonl.

    Args:
        source: a name in SOURCES.
        annotations: files of each split.
        images: the pictures.
        writer: not yet entered; leaves nothing behind when the rows are at fault.
        max_rejected: largest fraction of rows that may be left out.
        shrink: what to do with large pictures.
        workers: processes that read and check; the bytes written do not depend on it.
        on_progress: told how many rows are done, and how many there are.
    Raises:
        ValueError: a file is not in the source's format.
        TooManyRejectedError: see max_rejected, or nothing is left.
    """
    started, kind = time.monotonic(), SOURCES[source]
    rows = _read_rows(importlib.import_module(kind.module).read_rows, annotations)
    read = Reader(images=images, shrink=shrink, needs_image=kind.needs_image, drops_pictures=kind.drops_pictures)
    with writer:
        report = Report.load(writer.state["report"]) if writer.state else Report()
        todo = rows[report.num_rows :]
        results = map_in_order(read, [row for _, row in todo], workers)
        with (writer.folder / REJECTED_FILE).open("a", encoding="ascii") as rejected:
            rejected.truncate(writer.state.get("rejected_bytes", 0))
            before = todo[0][0] if todo else ""
            for (split, row), result in zip(todo, results, strict=True):
                if split != before:
                    writer.end(before)
                before = split
                if _settle(split, row, result, writer, report, rejected):
                    rejected.flush()
                    writer.mark({"report": report.state(), "rejected_bytes": rejected.tell()})
                on_progress(report.num_rows, len(rows))
        _check(report, annotations, max_rejected)
    report.seconds = time.monotonic() - started
    return report


def _read_rows(
    read_rows: Callable[[Path], list[Row]], annotations: Mapping[str, Sequence[Path]]
) -> list[tuple[str, Row]]:
    """All rows with their splits, those of a split together."""
    rows = [
        (row.split or split, row) for split, paths in annotations.items() for path in paths for row in read_rows(path)
    ]
    order = {split: number for number, split in enumerate(dict.fromkeys([*annotations, *(split for split, _ in rows)]))}
    return sorted(rows, key=lambda item: order[item[0]])


def _settle(
    split: str,
    row: Row,
    result: Sample | RejectedRowError,
    writer: ShardWriter,
    report: Report,
    rejected: IO[str],
) -> bool:
    """Write a row or list it; whether all that was written is in finished shards."""
    number = report.num_rows
    report.num_rows += 1
    entry = {"file": str(row.file), "row": row.number, "id": row.id}
    if isinstance(result, RejectedRowError):
        report.rejected[result.reason] += 1
        report.examples.setdefault(result.reason, f"row {row.number} of {row.file}: {result.detail}")
        rejected.write(json.dumps({**entry, "reason": result.reason, "detail": result.detail}) + "\n")
        return False
    for drop in result.dropped:
        report.dropped[drop.reason] += 1
        rejected.write(json.dumps({**entry, "reason": f"only a picture: {drop.reason}", "detail": drop.detail}) + "\n")
    report.kept[split] += 1
    report.num_bytes += sum(map(len, result.parts.values()))
    return writer.write(split, f"{number:0{KEY_WIDTH}d}", result.parts)


def _check(report: Report, annotations: Mapping[str, Sequence[Path]], max_rejected: float) -> None:
    rejected, kept = report.rejected.total(), report.kept.total()
    reasons = "; ".join(f"{count} {why} ({report.examples[why]})" for why, count in report.rejected.most_common())
    if rejected > max_rejected * (rejected + kept):
        raise TooManyRejectedError(
            f"{rejected} of {rejected + kept} rows cannot be used, more "
            f"than --max-rejected {max_rejected:g} allows: {reasons}. Nothing was written"
        )
    if empty := [split for split in annotations if not report.kept[split]]:
        raise TooManyRejectedError(
            f"no row of {', '.join(map(str, annotations[empty[0]]))} is left for the split {empty[0]}"
            f"{f': {reasons}' if reasons else ''}. Nothing was written"
        )
