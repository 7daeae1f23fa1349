"""How jobs of a run end, as far as they can say: lines of ends.jsonl; and DONE of a run that has finished. No torch."""

import json
import socket
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mmcore.constants import DONE_FILE
from mmcore.evaluation.scores import write_whole

END_LOG = "ends.jsonl"


def write_end(run: Path, code: int, reason: str) -> None:
    """Add the end of this job to the run's; where the disk does not let it, that is said and changes nothing."""
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = {"step": _last_step(run), "time": time, "host": socket.gethostname(), "code": code, "reason": reason}
    try:
        append_row(run / END_LOG, row)
    except OSError as error:
        print(f"mmcore train: {run / END_LOG} cannot be written: {error.strerror}", file=sys.stderr)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line of JSON to a log, whose last line a full disk may have torn."""
    with path.open("ab+") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + json.dumps(row).encode() + b"\n")


def write_done(run: Path, steps: int) -> None:
    """Say that a run has done all of its steps.

    Raises:
        ValueError: it cannot be written.
    """
    write_whole(run / DONE_FILE, f"{steps} steps\n".encode())


def _last_step(run: Path) -> int:
    """Of log.jsonl, whose last row may be torn."""
    try:
        with (run / "log.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - (1 << 16)))
            rows = [line for line in file.read().splitlines() if line.startswith(b'{"step": ') and line.endswith(b"}")]
        return int(json.loads(rows[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return 0
