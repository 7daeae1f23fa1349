"""Predictions and references of strangers: tables that are bombs, formulae, links to other files."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation import tables
from mmcore.evaluation.mme import load_questions
from mmcore.evaluation.predictions import load_predictions
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import read_json
from mmcore.foreign import parse_literal
from tests.security.payloads import zip_bomb
from tests.security.sandbox import opened

ROWS = [{"id": str(number), "answer": "A cat."} for number in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


def parquet(table: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def repeated(text: str, count: int) -> bytes:
    """One text, stored once, that stands in every row."""
    indices = pyarrow.array([0] * count, pyarrow.int32())
    return parquet(pyarrow.table({"answer": pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))}))


def workbook(changed: dict[str, Callable[[str], str]], added: dict[str, str] | None = None) -> bytes:
    """A workbook with the texts of some of its files changed."""
    book, plain, hostile = openpyxl.Workbook(), io.BytesIO(), io.BytesIO()
    for row in (list(ROWS[0]), *(list(row.values()) for row in ROWS)):
        book.active.append(row)
    book.save(plain)
    with zipfile.ZipFile(plain) as good, zipfile.ZipFile(hostile, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in good.namelist():
            text = good.read(name).decode()
            archive.writestr(name, changed[name](text) if name in changed else text)
        for name, text in (added or {}).items():
            archive.writestr(name, text)
    return hostile.getvalue()


SHEET = "xl/worksheets/sheet1.xml"
ENTITIES = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
LAUGHS = f'<!DOCTYPE x [<!ENTITY e0 "ha">{ENTITIES}]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY e0 SYSTEM "file:///etc/hostname">]>'


def sheet(*changes: tuple[str, str]) -> Callable[[], bytes]:
    """A workbook with texts in its worksheet replaced by others."""

    def changed(text: str) -> str:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        return text

    return lambda: workbook({SHEET: changed})


TABLES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a workbook of many megabytes of spaces": ("xlsx", sheet(("A cat.", " " * (1 << 26))), "unpack"),
    "a cell in row 10^12": (
        "xlsx",
        sheet(('<dimension ref="A1:B4" />', ""), ('<row r="3"', '<row r="1000000000000"')),
        "more than 4096 rows",
    ),
    "a text of entities of entities": (
        "xlsx",
        sheet(("<worksheet", f"{LAUGHS}<worksheet"), ("A cat.", "&e11;")),
        "no XLSX table",
    ),
    "a text of another file": (
        "xlsx",
        sheet(("<worksheet", f"{OUTSIDE}<worksheet"), ("A cat.", "&e0;")),
        "no XLSX table",
    ),
    "no workbook": ("xlsx", lambda: zip_bomb("a.json", 0), "no XLSX table"),
    "a zip of gigabytes of JSON": ("zip", lambda: zip_bomb("a.json", 1 << 25), "unpack"),
    "a workbook in a zip": ("zip", lambda: zip_bomb("a.xlsx", 1 << 25), "unpack"),
    "a zip of a table and a bomb": ("zip", lambda: zip_bomb("x", 1 << 25, ("a.json", b"[]")), "unpack"),
    "a column of one huge text": ("parquet", lambda: parquet(pyarrow.table({"a": ["A" * (1 << 25)]})), "unpack"),
    "a huge text in every row": ("parquet", lambda: repeated("A" * (1 << 22), 1000), "unpack"),
    "a list of millions of nothings": (
        "parquet",
        lambda: parquet(pyarrow.table({"a": pyarrow.array([[None] * (1 << 22)], pyarrow.list_(pyarrow.int32()))})),
        "4194304 values",
    ),
    "millions of rows of nothing": ("parquet", lambda: parquet(pyarrow.table({"a": pyarrow.nulls(1 << 22)})), "values"),
    "deep JSON": ("json", lambda: b"[" * 100_000, "nested too deeply"),
    "a deep line": ("jsonl", lambda: b'{"id": "1", "answer": "a"}\n' + b"[" * 100_000, "line 2 is not JSON"),
    "a number of a million digits": ("json", lambda: b"[" + b"1" * 1_000_000 + b"]", "4300 digits"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_hostile_table_is_refused(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_XLSX_ROWS", 1 << 12)  # rather than to wait for a million
    suffix, content, told = TABLES[name]
    (folder / f"a.{suffix}").write_bytes(content())
    outcome = opened(folder, lambda: len(list(read_rows(folder / f"a.{suffix}", "predictions"))))
    assert outcome.startswith("ValueError: ") and told in outcome, outcome


def test_formulae_are_not_worked_out_nor_links_followed(folder: Path) -> None:
    """A cell is what the workbook holds as its value: here nothing."""
    formula = '<c r="B2"><f>cmd|"/c touch ../marker"!A1</f></c><c r="C2" t="str"><f>[1]x!A1</f><v>kept</v></c>'
    link = '<?xml version="1.0"?><externalLink xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"/>'
    relation = (
        '<Relationship Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/externalLink" '
        'Target="file:///etc/hostname" TargetMode="External" Id="rId99"/></Relationships>'
    )
    data = workbook(
        {
            SHEET: lambda text: text.replace("</row>", f"{formula}</row>", 2).replace(formula, "", 1),
            "xl/_rels/workbook.xml.rels": lambda text: text.replace("</Relationships>", relation),
        },
        {"xl/externalLinks/externalLink1.xml": link},
    )
    (folder / "a.xlsx").write_bytes(data)
    outcome = opened(folder, lambda: json.dumps([row for _, row in read_rows(folder / "a.xlsx", "predictions")]))
    assert outcome.startswith("done: "), outcome
    assert json.loads(outcome.removeprefix("done: "))[0] == {"id": "0", "answer": ""}


def test_nothing_of_an_archive_is_unpacked_to_the_disk(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("../../marker.json", json.dumps(ROWS))
    outcome = opened(folder, lambda: len(load_predictions(folder / "a.zip", ["0", "1", "2"], folder / "r").answers))
    assert outcome == "done: 3"


def test_references_of_strangers(folder: Path) -> None:
    (folder / "MME.zip").write_bytes(zip_bomb("MME/existence/questions_answers_YN/1.txt", 1 << 25))
    assert "unpack" in opened(folder, lambda: load_questions(folder / "MME.zip"))
    (folder / "a.json").write_bytes(b"[" * 100_000)
    assert "nested too deeply" in opened(folder, lambda: read_json(folder / "a.json", "references"))


@pytest.mark.parametrize(
    "text", ["[" * 10_000, "-" * 100_000 + "1", "+".join("1" * 100_000), "a" + ".a" * 50_000, "__import__('os')", "[1"]
)
def test_lists_as_python_prints_them(folder: Path, text: str) -> None:
    assert opened(folder, lambda: parse_literal(text)).endswith("is no list as Python prints it")


def test_honest_tables_are_read(folder: Path) -> None:
    """Compressible ones too: ten thousand answers of one letter, and a prompt that is always the same."""
    many = [{"id": str(number), "prompt": "Answer with a letter. " * 10, "answer": "A"} for number in range(10_000)]
    (folder / "a.parquet").write_bytes(parquet(pyarrow.Table.from_pylist(many)))
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", json.dumps(many))
    for name in ("a.parquet", "a.zip"):
        assert [row for _, row in read_rows(folder / name, "predictions")] == many
    (folder / "a.xlsx").write_bytes(workbook({}))
    assert [row for _, row in read_rows(folder / "a.xlsx", "predictions")] == ROWS
    assert parse_literal("['a', 'b']") == ["a", "b"]


def test_a_footer_that_lies_about_its_pages(folder: Path) -> None:
    """The reader reserves what a page's header says; a footer with shorter numbers in its place does not help."""
    table = pyarrow.table({"a": ["A" * (1 << 25)]})
    data = parquet(table, use_dictionary=False, write_statistics=False, store_schema=False)
    length = int.from_bytes(data[-8:-4], "little")
    size = pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata.row_group(0).total_byte_size
    body, footer = data[: -8 - length], data[-8 - length :]
    assert footer.count(varint(size)) == 2
    (folder / "a.parquet").write_bytes(body + footer.replace(varint(size), varint(100, len(varint(size)))))
    assert pyarrow.parquet.ParquetFile(folder / "a.parquet").metadata.row_group(0).total_byte_size == 100
    outcome = opened(folder, lambda: len(list(read_rows(folder / "a.parquet", "predictions"))), most=1 << 24)
    assert "would unpack to 33554" in outcome, outcome


def varint(number: int, width: int = 0) -> bytes:
    """Thrift's compact form of a number, longer than it need be if asked."""
    rest, found = 2 * number, []
    while rest or len(found) < width or not found:
        found.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*found[:-1], found[-1] & 127])
