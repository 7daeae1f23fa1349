"""JSON Lines, plain or compressed."""

import contextlib
import gzip
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mmcore.foreign import MAX_LINE_BYTES, check_unpacked, parse_json


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, from 0, and content of every line that is not blank; a ValueError for one that is not JSON.

    Args:
        path: a file, compressed by gzip if its name ends in .gz, or a zip with one file in it.
    Raises:
        ValueError: missing or unreadable; a line is too long, or all are far longer than the compressed file.
    """
    try:
        with contextlib.ExitStack() as stack:
            file, size, unpacked = _open(path, stack), path.stat().st_size, 0
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b"")):
                check_unpacked(str(path), size, unpacked := unpacked + len(line))
                if len(line) == MAX_LINE_BYTES:
                    raise ValueError(f"{path}: line {number} (from 0) has {MAX_LINE_BYTES} bytes or more")
                if line.strip():
                    try:
                        yield number, parse_json(line)
                    except ValueError as error:  # of JSON or of UTF-8
                        yield number, error
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path, stack: contextlib.ExitStack) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(stack.enter_context(gzip.open(path)))
    if path.suffix != ".zip":
        return stack.enter_context(path.open("rb"))
    archive = stack.enter_context(zipfile.ZipFile(path))
    names = [name for name in archive.namelist() if not name.endswith("/")]
    if len(names) != 1:
        raise ValueError(f"{path} holds {len(names)} files where one is expected: unpack it and name them")
    return stack.enter_context(archive.open(names[0]))
