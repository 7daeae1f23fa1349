"""Rows of the files that benchmarks and their predictions come in: JSON, JSON lines, TSV, CSV, XLSX, Parquet, zipped.

Text stays text: "None", "NA" and empty cells of a table are what the file says, never a missing number.
"""

import csv
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmcore.evaluation.parquet_pages import page_sizes
from mmcore.foreign import check_unpacked, check_zip, parse_json

Row = tuple[str, Any]
"""Where it stands in its file, for messages; and what it is, of tables a dict of column to value."""

# Base64 pictures are cells of MMBench's tables.
csv.field_size_limit(sys.maxsize)

# Of a worksheet (Excel's limit): a cell of a few bytes can say that it stands in row 10^12.
MAX_XLSX_ROWS = 1 << 20

# Bytes of a column of Parquet that are looked at together: each of its values may be as long as all of it.
BATCH_BYTES = 1 << 27

# Values of a Parquet file, however small: one that is always the same takes next to nothing.
FREE_VALUES = 1 << 20


def read_rows(path: Path, what: str) -> Iterator[Row]:
    """Yield the rows of a file: of a JSON list its items, of any other JSON the one thing that it is.

    Args:
        path: its suffix tells the format; .json and .jsonl, and all others, may be either of the two.
        what: for messages, such as "predictions".
    Raises:
        ValueError: missing, unreadable, not in its format, or far larger than its file; says where.
    """
    try:
        yield from _read(path.name, path.read_bytes(), str(path), what)
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror}") from None


def _read(name: str, content: bytes, where: str, what: str) -> Iterator[Row]:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".zip":
        yield from _zip(content, where, what)
    elif suffix == ".xlsx":
        yield from _xlsx(content, where, what)
    elif suffix == ".parquet":
        yield from _parquet(content, where, what)
    elif suffix in (".tsv", ".csv"):
        lines = io.StringIO(_text(content, where, what), newline="")
        try:
            for number, row in enumerate(csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ","), 1):
                yield f"{where} row {number}", row
        except csv.Error as error:
            raise ValueError(f"{what} {where} is no {suffix[1:].upper()} table: {error}") from None
    else:
        yield from _json(_text(content, where, what), where, what)


def _text(content: bytes, where: str, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {where} is not UTF-8 text: byte {error.start}") from None


def _json(text: str, where: str, what: str) -> Iterator[Row]:
    try:
        content = parse_json(text) if text.lstrip()[:1] in ("[", "{") else None
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise ValueError(
                f"{what} {where} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
            ) from None
        content = None  # JSON lines, or a fault that is told of its line
    if isinstance(content, list):
        yield from ((f"{where} row {index}", row) for index, row in enumerate(content))
        return
    if isinstance(content, dict):
        yield where, content
        return
    # Not splitlines(): it would also split at U+2028 and the like, inside of an answer.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{where} line {number}", parse_json(line.rstrip().rstrip(","))  # SEED-Bench's have commas
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} line {number} is not JSON ({error.msg}): {what} are JSON lines, or one JSON list"
                ) from None


def _xlsx(content: bytes, where: str, what: str) -> Iterator[Row]:
    try:
        import openpyxl
    except ImportError:
        raise ValueError(f"{where} needs openpyxl: install mmcore with its extra `eval`") from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_zip(archive, where)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{what} {where} is no XLSX table: {error}") from None
    try:
        # Values, not formulae; and nothing of other workbooks that it names.
        book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True, keep_links=False)
        sheet = book.worksheets[0]
        rows = sheet.iter_rows(values_only=True)
        names = next(rows, ())
        for number, cells in enumerate(rows, 1):
            if number > MAX_XLSX_ROWS:
                raise ValueError(f"it has more than {MAX_XLSX_ROWS} rows")
            # A column without a name is an index that somebody's library has written.
            row = {str(name): cell for name, cell in zip(names, cells, strict=False) if name is not None}
            if any(cell is not None for cell in row.values()):
                yield f"{where} row {number}", {name: "" if cell is None else cell for name, cell in row.items()}
    except Exception as error:  # openpyxl raises whatever it stumbles over
        raise ValueError(f"{what} {where} is no XLSX table: {error}") from None


def _parquet(content: bytes, where: str, what: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{where} needs pyarrow: install mmcore with its extra `eval`") from None
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        number = unpacked = 0
        for batch in table.iter_batches(_batch_size(table.metadata, content, where)):
            check_unpacked(where, len(content), unpacked := unpacked + batch.nbytes)
            for row in batch.to_pylist():
                number += 1
                yield f"{where} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{what} {where} is no Parquet table: {error}") from None


def _batch_size(metadata: Any, content: bytes, where: str) -> int:
    """Rows of a Parquet file that are read together.

    Raises:
        ValueError: its columns are far larger than the file, or have more values than it has bits.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    sizes = page_sizes(content, columns)
    check_unpacked(where, len(content), sum(sizes))
    count = max(metadata.num_rows, sum(column.num_values for column in columns))
    if count > max(FREE_VALUES, 8 * len(content)):
        raise ValueError(f"{where} would have {count} values in {len(content)} bytes, as no honest file does")
    return max(1, min(256, BATCH_BYTES // max([1, *sizes])))


def _zip(content: bytes, where: str, what: str) -> Iterator[Row]:
    """Rows of the one table in an archive. Nothing is unpacked to the disk."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            suffixes = (".json", ".jsonl", ".tsv", ".csv", ".xlsx", ".parquet")
            names = [name for name in archive.namelist() if PurePosixPath(name).suffix.lower() in suffixes]
            check_zip(archive, where)
            if len(names) != 1:
                raise ValueError(f"{what} {where} holds {len(names)} tables: unpack it, and name the one that counts")
            yield from _read(names[0], archive.read(names[0]), f"{where}:{names[0]}", what)
    except zipfile.BadZipFile:
        raise ValueError(f"{what} {where} is no zip archive") from None
