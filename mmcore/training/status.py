"""What a run's folder tells of it at a glance, and what of that a person has to see to. From the files alone: no torch.

DONE, suspect.json, hang-*.txt and ends.jsonl say how jobs ended, the lock whether one runs, log.jsonl how it goes.
"""

import fcntl
import itertools
import json
import math
import os
import shutil
import statistics
import struct
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mmcore.checkpoint_files import DAMAGED, MANIFEST_FILE, step_folders, verify
from mmcore.constants import DONE_FILE, EXIT_DONE, EXIT_PREEMPTED, EXIT_SUSPECT
from mmcore.evaluation.histogram import bar
from mmcore.evaluation.run_files import Row, RunRecord, mean, read_rows, read_run, values
from mmcore.training.ends import END_LOG
from mmcore.training.run_lock import LOCK_FILE

# Steps whose speed is set against that of all; how much slower is worth a person's time.
RECENT, SLOW = 20, 0.7
# A job that says nothing for so long, and for so many of its steps, is looked at.
SILENT_SECONDS, SILENT_STEPS = 1200, 20

PLOT_HEIGHT = 8
BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


@dataclass(slots=True)
class Status:
    """Lines to print, and what of them needs a person."""

    lines: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def tell(self, name: str, text: str) -> None:
        self.lines.append(f"{name:<12}{text}")


def read_status(
    run: Path, *, checksums: bool = False, width: int = 80, ascii_only: bool = False, now: float | None = None
) -> Status:
    """Look at a run.

    Args:
        checksums: whether all of the newest checkpoint is read, or its files' sizes alone.
        width: of a line, in characters.
        ascii_only: whether bars are of `#`, for terminals that cannot show blocks.
        now: seconds since 1970.
    Raises:
        ValueError: there is no run, or its files are not what the trainer writes.
    """
    now = time.time() if now is None else now
    if not (run / LOCK_FILE).exists() and not (run / "log.jsonl").exists():
        raise ValueError(f"{run} is no run: it has neither a log.jsonl nor a {LOCK_FILE}")
    torn: list[str] = []
    starts = _jobs(run / "starts.jsonl", ("time", "world_size"), torn)
    ends = _jobs(run / END_LOG, ("time", "code", "reason"), torn)
    record = replace(read_run(run), starts=starts) if _has_steps(run / "log.jsonl") else None
    holder, status = lock_holder(run), Status()
    _progress(status, record, ascii_only=ascii_only)
    _state(status, run, record, ends, holder, now)
    if record:
        _speed(status, record, is_running=holder is not None)
        _faults(status, record)
    _checkpoint(status, run, record, checksums, now)
    _history(status, starts, ends, holder)
    _left_behind(status, run)
    if torn:
        status.tell("unreadable", ", ".join(torn))
    if record:
        status.lines += ["", *plot(record, width, ascii_only=ascii_only)]
    return status


def _jobs(path: Path, names: Sequence[str], torn: list[str]) -> list[Row]:
    """Rows of starts or ends; what a full disk has torn, or another version has written, is left out and named."""
    rows = read_rows(path, torn) if path.exists() else []
    whole = [row for row in rows if all(name in row for name in names) and isinstance(row["time"], str)]
    if len(whole) < len(rows):
        torn.append(f"{len(rows) - len(whole)} rows of {path.name}")
    return whole


def _has_steps(path: Path) -> bool:
    """Whether it has a whole line: a job may have been killed in its first."""
    return path.exists() and bool(read_rows(path))


def lock_holder(run: Path) -> dict[str, Any] | None:
    """The process that writes the run, as it has called itself; None where there is none. The lock is not touched.

    A record lock of another machine is seen where the file system has such locks; see mmcore.training.run_lock.
    """
    path = run / LOCK_FILE
    try:
        with path.open("rb") as file:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
            kind, *_ = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))
            content = json.loads(file.read() or b"{}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return None if kind == fcntl.F_UNLCK else dict(content)


def _progress(status: Status, record: RunRecord | None, *, ascii_only: bool) -> None:
    if not record:
        status.tell("step", "none yet")
        return
    last, planned = record.steps[-1], record.num_steps
    share = last["step"] / planned
    status.tell("step", f"{last['step']:,} of {planned:,}  {bar(share, 30, ascii_only=ascii_only):<30} {share:.0%}")
    (loss,) = values([last], "loss")
    parts = [f"loss {loss:.4f}" if math.isfinite(loss) else "loss is not finite"]
    if record.validation:
        row = record.validation[-1]
        parts.append(f"on the val split {row['loss']:.4f} (step {row['step']:,})")
    if record.scores:
        row = record.scores[-1]
        parts += [f"{name} {value:.4f} (step {row['step']:,})" for name, value in list(row["metrics"].items())[:1]]
    status.tell("loss", ", ".join(parts))


def _state(
    status: Status, run: Path, record: RunRecord | None, ends: Sequence[Row], holder: dict[str, Any] | None, now: float
) -> None:
    """Whether it runs, is done, waits to be started, or has stopped."""
    begun = _seconds(record.starts[-1]["time"]) if record and record.starts else 0.0
    if holder is not None:
        who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "a process"
        spoke = max(begun, _modified(run / "log.jsonl"), _modified(run / LOCK_FILE))
        step = statistics.median(values(record.steps[-100:], "seconds") or [0.0]) if record else 0.0
        status.tell("state", f"running ({who}), last heard of {_ago(now - spoke)}")
        if now - spoke > max(SILENT_SECONDS, SILENT_STEPS * step):
            status.findings.append(
                f"it has logged no step for {_span(now - spoke)}: see what it does (`py-spy dump --pid`), or end it"
            )
        return
    if (run / DONE_FILE).exists():
        status.tell("state", "finished")
        return
    end = ends[-1] if ends and _seconds(ends[-1]["time"]) >= begun else None
    if not end:
        status.tell("state", "not running")
        status.findings.append("no process holds the run and the last job ended without a word: it was killed, or lost")
        return
    status.tell("state", f"not running for {_span(now - _seconds(end['time']))}: code {end['code']}, {end['reason']}")
    if end["code"] not in (EXIT_DONE, EXIT_PREEMPTED, EXIT_SUSPECT):
        status.findings.append(f"the last job ended with code {end['code']}: {end['reason']}")


def _speed(status: Status, record: RunRecord, *, is_running: bool) -> None:
    rows = [row for row in record.steps if row.get("tokens_per_s")]
    if not rows:
        return
    whole = statistics.median(values(rows, "tokens_per_s"))
    recent = statistics.median(values(rows[-RECENT:], "tokens_per_s"))
    share, waits = recent / whole, mean(values(rows[-RECENT:], "data_wait"))
    told = f"{recent:,.0f} tokens/s, {share:.0%} of the run's median"
    if math.isfinite(waits):
        told += f", {waits:.0%} of the time waiting for data"
    status.tell("speed", told)
    left = record.num_steps - record.steps[-1]["step"]
    if left:
        seconds = statistics.median(values(rows[-100:], "seconds")) * left
        if math.isfinite(seconds):
            until = "" if is_running else ", once it runs"
            status.tell("left", f"{_span(seconds)} of steps, without saves and scores{until}")
    if share < SLOW and len(rows) > 2 * RECENT and is_running:
        status.findings.append(
            f"its last {RECENT} steps are at {share:.0%} of its own speed: "
            + ("the data is slow" if waits > 0.3 else "a GPU, a node or the network is slow")
        )


def _faults(status: Status, record: RunRecord) -> None:
    faults = [row for row in record.steps if row.get("fault")]
    last = record.steps[-1]
    told = [f"{len(faults)} bad steps, the last {faults[-1]['step']:,} ({faults[-1]['fault']})"] if faults else []
    told += [f"{last[name]:,} samples {name}" for name in ("skipped", "cut") if last.get(name)]
    if told:
        status.tell("data", ", ".join(told))
    if sum(bool(row.get("fault")) for row in record.steps[-100:]) >= 10:
        status.findings.append("ten or more of the last 100 steps were bad")


def _checkpoint(status: Status, run: Path, record: RunRecord | None, checksums: bool, now: float) -> None:
    folders = step_folders(run)
    if not folders:
        status.tell("checkpoint", "none yet")
    else:
        newest = folders[-1]
        problems = verify(newest, checksums=checksums)
        if not (newest / MANIFEST_FILE).is_file():
            problems = [f"{MANIFEST_FILE} is missing"]
        how = "all checksums agree" if checksums else "sizes agree"
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        health = f"DAMAGED: {problems[0]}" if problems else how
        age = _ago(now - _modified(newest / MANIFEST_FILE))
        status.tell("checkpoint", f"{newest.name}, {age}, {size / 1e9:.3g} GB, {health}; {len(folders)} in all")
        if problems:
            follows = "the run will go on from the one before" if folders[1:] else "and there is no other"
            status.findings.append(f"{newest.name} is damaged ({problems[0]}): {follows}")
        free = shutil.disk_usage(run).free
        if free < size and not (run / DONE_FILE).exists():
            status.findings.append(f"{free / 1e9:.3g} GB are free, too little for the next checkpoint: make room")
    if damaged := sorted(path.name for path in run.glob(f"{DAMAGED}*")):
        status.tell("set aside", ", ".join(damaged))


def _history(status: Status, starts: Sequence[Row], ends: Sequence[Row], holder: dict[str, Any] | None) -> None:
    """Each job, and why it ended."""
    if len(starts) < 2 and not ends:
        return
    status.tell("jobs", f"{len(starts)}" + (", the last five:" if len(starts) > 5 else ":"))
    for index, start in list(enumerate(starts))[-5:]:
        begun = _seconds(start["time"])
        until = _seconds(starts[index + 1]["time"]) if index + 1 < len(starts) else math.inf
        own = [end for end in ends if begun <= _seconds(end["time"]) <= until]
        if own:
            reason = f"code {own[0]['code']} after step {own[0]['step']:,}: {own[0]['reason']}"
        elif until == math.inf and holder is not None:
            reason = "running"
        else:
            reason = "killed, or lost"
        ranks = f"{start['world_size']} rank" + "s" * (start["world_size"] != 1)
        told = textwrap.shorten(reason, 100, placeholder=" …")
        status.lines.append(f"{'':12}{start['time']}, {ranks}, from step {start['step']:,}: {told}")
        for other in own[1:]:  # of jobs that did not come as far as to say that they train
            told = textwrap.shorten(f"code {other['code']}: {other['reason']}", 100, placeholder=" …")
            status.lines.append(f"{'':12}{other['time']}, ended before its first step: {told}")


def _left_behind(status: Status, run: Path) -> None:
    """Of suspect steps and hangs; what the jobs since have outlived is told, and needs nobody."""
    hangs = sorted(run.glob("hang-*.txt"), key=_modified)
    if hangs:
        status.tell("hangs", ", ".join(path.name for path in hangs[-3:]))
    suspect = run / "suspect.json"
    if not suspect.exists():
        return
    try:
        for place in json.loads(suspect.read_text())["places"]:
            good = ", good in a later job: one of these machines computes wrongly" * bool(place.get("was_good_again"))
            status.tell("suspect", f"step {place['step']:,}, {place['time']}, on {', '.join(place['hosts'])}{good}")
    except (ValueError, KeyError, TypeError):  # the next job takes it for none, too
        status.tell("suspect", f"{suspect.name} cannot be read")


def plot(record: RunRecord, width: int, *, ascii_only: bool = False) -> list[str]:
    """The loss in characters: as many medians of equally many steps as there is room for."""
    rows = [row for row in record.steps if math.isfinite(*values([row], "loss")) and not row.get("fault")]
    room = max(10, width - 10)
    if len(rows) < 2:
        return []
    count = min(room, len(rows))
    cuts = [len(rows) * index // count for index in range(count + 1)]
    points = [statistics.median(values(rows[at:end], "loss")) for at, end in itertools.pairwise(cuts)]
    low, high = min(points), max(points)
    heights = [PLOT_HEIGHT * (point - low) / (high - low) if high > low else 0.0 for point in points]
    blocks = " #" if ascii_only else BLOCKS
    lines = []
    for level in reversed(range(PLOT_HEIGHT)):
        label = f"{high:9.4f}" if level == PLOT_HEIGHT - 1 else f"{low:9.4f}" if level == 0 else " " * 9
        # The lowest is shown too.
        cells = [max(0.0, min(1.0, height - level), 1 / (len(blocks) - 1) * (level == 0)) for height in heights]
        lines.append(f"{label} {''.join(blocks[round(cell * (len(blocks) - 1))] for cell in cells).rstrip()}")
    first, last = f"step {rows[0]['step']:,}", f"{rows[-1]['step']:,}"
    return [*lines, f"{'loss':>9} {first}{last:>{max(1, count - len(first))}}"]


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _ago(seconds: float) -> str:
    return f"{_span(max(0.0, seconds))} ago"
