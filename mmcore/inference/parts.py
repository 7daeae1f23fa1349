"""Predictions row by row while they are made, so that a killed run goes on where it stopped. No torch.

    predictions.jsonl.part0   answers of the first replica, as they came; its first line says of which run they are
    predictions.jsonl         all answers in the order of the examples: there once the last one is

Each replica's main rank writes a part of its own, on a file system that all of them see. A run with another number of
replicas goes on with what all parts hold.
"""

import fcntl
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmcore.evaluation.predictions import write_predictions
from mmcore.evaluation.task import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One answer."""

    id: str
    answer: str
    finish_reason: str
    """As of `mmcore.inference.engine`; "chosen" where it is one of the example's choices."""


def read_parts(output: Path, run: Mapping[str, Any]) -> dict[str, Row]:
    """Answers that are there already, by id.

    What a kill has left of a row, at the end of a file, does not count.

    Args:
        output: the name of the whole.
        run: what the answers depend on, by the names that people know it by.
    Raises:
        ValueError: they are another run's, or cannot be read.
    """
    rows: dict[str, Row] = {}
    run = json.loads(json.dumps(run))  # as it comes back
    for path in _parts(output):
        with path.open("rb") as file:
            lines = _whole_lines(file)
        if not lines:
            continue
        try:
            begun, *found = [json.loads(line) for line in lines]
            rows |= {row["id"]: Row(**row) for row in found}
            begun = begun["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as a part of predictions ({error}): remove it") from None
        other = [name for name in {**begun, **run} if begun.get(name) != run.get(name)]
        if other:
            differences = "; ".join(f"{name}: {_shown(begun, name)}, now {_shown(run, name)}" for name in other)
            raise ValueError(
                f"{path} holds answers of another run ({differences}): go on with that one's options, give another "
                f"--output, or remove {output}.part* to begin anew"
            )
    return rows


class Part:
    """The part that this process writes."""

    def __init__(self, output: Path, replica: int, run: Mapping[str, Any]) -> None:
        """Go on with the replica's part, or begin it.

        Args:
            output, run: as `read_parts` took them.
        Raises:
            ValueError: another process writes it, or it cannot be written.
        """
        path = output.with_name(f"{output.name}.part{replica}")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self.file: BinaryIO = path.open("a+b")
            _lock(self.file)
            # By the same handle: closing another one would give up the lock.
            self.file.seek(0)
            size = sum(map(len, _whole_lines(self.file)))
            self.file.truncate(size)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another run: wait for it, or give another --output") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
        if not size:
            self._write({"run": dict(run)})

    def add(self, row: Row) -> None:
        """Write a row; once this returns, killing the process does not lose it."""
        self._write(asdict(row))

    def close(self) -> None:
        self.file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


def publish(output: Path, examples: Sequence[Example], rows: Mapping[str, Row]) -> None:
    """Write all answers under their final name, and remove the parts.

    Raises:
        ValueError: answers are missing, or the file cannot be written.
    """
    missing = [example.id for example in examples if example.id not in rows]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(examples)} answers are not in {output}.part*, the first is that of {missing[0]}: "
            "all ranks have to write to one file system. Start the run again there"
        )
    write_predictions(output, examples, [rows[example.id].answer for example in examples])
    for path in _parts(output):
        path.unlink()


def _parts(output: Path) -> list[Path]:
    found = output.parent.glob("*") if output.parent.is_dir() else iter(())
    prefix = f"{output.name}.part"
    return sorted(path for path in found if path.name.startswith(prefix) and path.name[len(prefix) :].isdigit())


def _lock(file: BinaryIO) -> None:
    """
    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which of the two depends on the system
        raise BlockingIOError from error
    except OSError as error:
        print(f"{file.name} cannot be locked ({error.strerror}): let no other run write it", file=sys.stderr)


def _whole_lines(file: Iterable[bytes]) -> list[bytes]:
    """Lines that end, with their ends."""
    return [line for line in file if line.endswith(b"\n")]


def _shown(run: Mapping[str, Any], name: str) -> str:
    return json.dumps(run[name], ensure_ascii=False) if name in run else "nothing"
