"""Histograms and the terminal's report, wide and narrow, in Unicode and in ASCII."""

import io
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from mmcore.evaluation.curves import short
from mmcore.evaluation.histogram import bar, lines, span, svg
from mmcore.evaluation.inspection_table import print_report, printable, share

BINS = [[0, 99, 1], [100, 199, 0], [200, 299, 2000]]


def test_lines_by_hand() -> None:
    assert lines(BINS, 24, ascii_only=True) == [
        "   0-99 #              1",
        "100-199                0",
        "200-299 ########## 2,000",
    ]
    assert lines([], 40, ascii_only=False) == []


def test_bars_by_hand() -> None:
    assert bar(0.5, 4, ascii_only=False) == "\u2588\u2588"
    assert bar(0.53, 4, ascii_only=False) == "\u2588\u2588\u258f"
    assert bar(0.97, 4, ascii_only=False) == "\u2588\u2588\u2588\u2589"
    assert bar(1e-9, 4, ascii_only=False) == "\u258f" and bar(1e-9, 4, ascii_only=True) == "#"
    assert bar(0, 4, ascii_only=False) == "" == bar(0, 4, ascii_only=True)


def test_numbers() -> None:
    assert [short(number) for number in (0, 9999, 12345, 2.5e6, 1e9)] == ["0", "9999", "12.3k", "2.5M", "1G"]
    assert [span(3, 3), span(1000, 1999)] == ["3", "1,000-1,999"]
    told = [share(count, 1_000_000) for count in (0, 1, 500, 123456, 999_999, 1_000_000)]
    assert told == ["0 %", "< 0.01 %", "0.05 %", "12.35 %", "> 99.99 %", "100 %"]
    assert share(0, 0) == "0 %"


def test_svg_has_a_bar_for_each_bin_that_is_not_empty() -> None:
    chart = ElementTree.fromstring(svg(BINS, title="<t>", x_label="tokens & more", y_label="<n>", limit=150))
    bars = chart.findall("rect")
    assert [one.findtext("title") for one in bars] == ["0-99 tokens & more: 1", "200-299 tokens & more: 2,000"]
    small, large = (float(one.get("height")) for one in bars)  # type: ignore[arg-type]
    assert small == 1 and large > 200
    assert all(float(one.get("y")) + float(one.get("height")) <= 257 for one in bars)  # type: ignore[arg-type]
    texts = [text.text for text in chart.iter("text")]
    assert {"window 150", "tokens & more", "<n>", "2000", "1"} <= {*texts}
    assert not [text for text in svg(BINS, title="", x_label="", y_label="", limit=5000).split("<") if "limit" in text]
    assert "nothing to count" in svg([], title="", x_label="", y_label="")


def report(**changes: Any) -> dict[str, Any]:
    finding = {"name": "x", "title": "something", "meaning": "It hurts.", "hurts": True, "count": 3, "of": 9}
    example = {"source": "s", "shard": "a.tar", "key": "\x1b[2J\u4f60\ud800", "detail": "wrong"}
    counts = ("samples", "excluded", "text only", "tokens", "tokens of pictures", "trained tokens")
    told = {"mean": 1.0, "percentiles": {}, "bins": BINS}
    source = {"name": "s\u00e9", "share_of_draws": 0.5, "samples": 2, "usable": 1, "text_only": 0}
    return {
        "dataset": "d",
        "split": "train",
        "conversation": "plain",
        "seq_length": 64,
        "num_samples": 9,
        "num_inspected": 9,
        "pictures_decoded": True,
        "passed": False,
        "findings": [{**finding, "unit": "samples", "by_source": {}, "examples": [example]}],
        "counts": {**dict.fromkeys(counts, 1), "tokens beyond the window": 0},
        "token_ids": {"lowest_and_highest": None, "tokenizer": 7, "model": 128},
        "lengths": told,
        "pictures": told,
        "padding": {"rows of 64": 0.5},
        "sources": [source, source],
        **changes,
    }


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("width", [40, 80, 300])
def test_the_report_survives_any_terminal(encoding: str, width: int) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_report(report(), Console(file=stream, width=width))
    stream.seek(0)
    told = stream.read()
    assert max(map(len, told.splitlines())) <= min(width, 110)
    assert ("\u2588" in told) == (encoding == "utf-8") and ("##" in told) == (encoding != "utf-8")
    assert "\x1b" not in told and r"\x1b[2J\u4f60\ud800" in "".join(told.split()).replace("\u2502", "")
    assert "200-299" in told and "50.00 %" in told and "hurts" in told


def test_text_that_a_terminal_would_obey() -> None:
    assert printable("a b\x1b]0;x\x07\n\ud800\u202e") == r"a b\x1b]0;x\x07\n\ud800\u202e"
