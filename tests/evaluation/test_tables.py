"""Rows out of every format that benchmarks are published in."""

import json
import zipfile

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation.tables import read_rows

ROWS = [{"id": "1", "text": "None"}, {"id": "2", "text": 'a\u2028b, "c"'}, {"id": "3", "text": ""}]


def rows(path):
    return [row for _, row in read_rows(path, "answers")]


def test_every_format_holds_the_same(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    (tmp_path / "a.tsv").write_text('id\ttext\n1\tNone\n2\t"a\u2028b, ""c"""\n3\t\n')
    (tmp_path / "a.csv").write_text('id,text\n1,None\n2,"a\u2028b, ""c"""\n3,\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    book = openpyxl.Workbook()
    for row in (ROWS[0], *(row.values() for row in ROWS)):
        book.active.append(list(row))
    book.save(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.tsv", "inside/a.tsv")
        archive.writestr("readme.txt", "")
    for suffix in ("json", "jsonl", "tsv", "csv", "parquet", "xlsx", "zip"):
        assert rows(tmp_path / f"a.{suffix}") == ROWS, suffix


def test_an_object_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "b"}\n')
    assert list(read_rows(tmp_path / "a.json", "answers")) == [(str(tmp_path / "a.json"), {"a": "b"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1}, {', "answers .*a.json is not JSON: .* in line 1"),
        ("a.json", b'{"a": 1}\n{"a"', "line 2 is not JSON"),
        ("a.jsonl", b"\xff", "is not UTF-8 text: byte 0"),
        ("a.xlsx", b"no", "is no XLSX table"),
        ("a.parquet", b"no", "is no Parquet table"),
        ("a.zip", b"no", "is no zip archive"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / name)


def test_archives_of_several_tables(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.json", "[]")
        archive.writestr("b.json", "[]")
    with pytest.raises(ValueError, match="holds 2 tables"):
        rows(tmp_path / "a.zip")


def test_an_index_without_a_name_is_no_column(tmp_path):
    """As pandas writes it."""
    book = openpyxl.Workbook()
    for row in ((None, "id", "text"), (0, "1", "None"), (1, "2", None)):
        book.active.append(list(row))
    book.save(tmp_path / "a.xlsx")
    assert rows(tmp_path / "a.xlsx") == [{"id": "1", "text": "None"}, {"id": "2", "text": ""}]


def test_lines_that_end_in_commas(tmp_path):
    (tmp_path / "a.json").write_text('{"id": 1},\n{"id": 2},\n')
    assert rows(tmp_path / "a.json") == [{"id": 1}, {"id": 2}]
