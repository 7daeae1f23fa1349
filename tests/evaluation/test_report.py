"""The report: one file that asks for nothing, with every text escaped."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mmcore.evaluation.curves import Curve, log_ticks, smooth, svg, ticks
from mmcore.evaluation.report import GalleryItem, SummaryRow, write_report

ROOT = Path(__file__).resolve().parents[2]
ATTACK = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)> \"'& \ud800"


def picture(size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def report(path: Path, **changes: object) -> str:
    content = {
        "title": ATTACK,
        "summary": [
            SummaryRow(name=ATTACK, value="1 %", note=ATTACK, passed=False),
            SummaryRow(name="part", value="2"),
        ],
        "curves": [Curve(ATTACK, [1, 2, 3], [3.0, 0.1, math.nan])],
        "gallery": [
            GalleryItem(image=picture(), generated=ATTACK, true="a cat", correct=False, label=ATTACK, prompt=ATTACK),
            GalleryItem(image=None, generated="a dog", true="a dog", correct=True),
        ],
        "notes": [ATTACK],
    }
    write_report(path, **(content | changes))
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every tag with its attributes, and the texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_nothing_is_loaded_from_anywhere(tmp_path):
    page = report(tmp_path / "report.html")
    assert not re.search(r"https?://|//[a-z]|url\(|@import", page.replace("http://www.w3.org/2000/svg", ""))
    tags = Tags(page).tags
    sources = [attrs[name] for _, attrs in tags for name in ("src", "href", "srcset", "data") if name in attrs]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in tags}
    assert [attrs for tag, attrs in tags if tag == "script"] == [{}]


def test_every_text_is_escaped(tmp_path):
    parsed = Tags(report(tmp_path / "report.html"))
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert [tag for tag, _ in parsed.tags].count("img") == 1
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    shown = ATTACK.replace("\ud800", "?")
    assert parsed.texts.count(shown) == 9  # title twice, row, its note, curve, label, prompt, generated, footer


def test_pictures_are_inside_and_large_ones_scaled_down(tmp_path):
    from base64 import b64decode

    (tmp_path / "photo.bmp").write_bytes(picture((2000, 1000), "BMP"))
    items = [
        GalleryItem(image=image, generated="", true="x", correct=False) for image in (picture(), tmp_path / "photo.bmp")
    ]
    sources = [attrs["src"] for tag, attrs in Tags(report(tmp_path / "r.html", gallery=items)).tags if tag == "img"]
    small, large = (source.partition(";base64,") for source in sources)
    assert small[0] == "data:image/png" and b64decode(small[2]) == picture()
    assert large[0] == "data:image/jpeg" and Image.open(io.BytesIO(b64decode(large[2]))).size == (512, 256)


def test_a_picture_that_is_none_leaves_no_report(tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    items = [GalleryItem(image=tmp_path / "x.png", generated="", true="", correct=False)]
    with pytest.raises(ValueError, match=r"x\.png cannot be shown"):
        report(tmp_path / "report.html", gallery=items)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_wrong_words_are_marked(tmp_path):
    items = [GalleryItem(image=None, generated="a <7> above 3", true="a <9> above 3", correct=False)]
    page = report(tmp_path / "report.html", gallery=items)
    assert "<dd>a <mark>&lt;7&gt;</mark> above 3</dd>" in page
    assert "<dd>a &lt;9&gt; above 3</dd>" in page


def test_axis_marks_are_round():
    assert ticks(0, 3.2) == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert ticks(1, 800, 6) == [100, 200, 300, 400, 500, 600, 700, 800]
    assert ticks(5, 5) == [5]
    assert log_ticks(0.02, 3) == [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    assert log_ticks(1e-4, 3) == [1e-4, 1e-3, 1e-2, 1e-1, 1]


def test_smoothing_is_centred_and_skips_what_is_no_number():
    assert smooth([1, 2, 6, 3], 1) == [1, 2, 6, 3]
    assert smooth([1, 2, 6, 4], 3) == [1.5, 3, 4, 5]
    assert smooth([1, math.nan, 5], 3) == [1, 3, 5]
    assert math.isnan(smooth([math.inf], 3)[0])


@pytest.mark.parametrize("losses", [[1.0], [0.0, 0.0], [2.0, 2.0, 2.0], [5.0, 1e-9], [-1.0, 1.0], [1.0, math.inf, 0.5]])
def test_any_curve_is_drawn_inside_the_picture(losses):
    drawn = svg(Curve("x", list(range(1, len(losses) + 1)), losses))
    numbers = [
        tuple(map(float, point.split()))
        for path in re.findall(r' d="M([^"]*)"', drawn)
        for point in re.split("[ML]", path)
    ]
    assert numbers and all(0 <= x <= 560 and 0 <= y <= 300 for x, y in numbers)
    assert "nan" not in drawn and "inf" not in drawn


def test_a_curve_without_losses_says_so():
    assert "No finite loss" in svg(Curve("x", [], []))
    assert "No finite loss" in svg(Curve("x", [1], [math.nan]))


def test_gaps_are_gaps():
    drawn = svg(Curve("x", [1, 2, 3, 4, 5], [1, 1, math.nan, 1, 1]))
    raw = re.search(r'class="raw" d="([^"]*)"', drawn)[1]
    assert (raw.count("M"), raw.count("L")) == (2, 2)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")
def test_a_browser_shows_and_filters_it(tmp_path):
    many = [GalleryItem(image=None, generated=str(n), true=str(n), correct=n % 2 == 0) for n in range(100)]
    page = report(tmp_path / "report.html", title="Quiet", gallery=many)
    # The script's own functions, driven as a person would: press "Wrong", then search.
    steps = 'buttons[1].click(); document.title += " " + found.textContent; search.value = "1 9"; search.oninput();'
    (tmp_path / "driven.html").write_text(page.replace("</script>", f"{steps}</script>"))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "driven.html").as_uri()]
    shown = Tags(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert "Quiet 50 of 100" in shown.texts
    assert "2 of 100" in shown.texts  # 19 and 91
    items = [attrs for tag, attrs in shown.tags if tag == "article"]
    assert [attrs["data-text"].split()[-1] for attrs in items if "hidden" not in attrs] == ["19", "91"]
    assert [attrs["aria-pressed"] for tag, attrs in shown.tags if tag == "button" and "value" in attrs] == [
        "false",
        "true",
        "false",
    ]


@pytest.fixture
def run(tmp_path):
    """What the quickstart leaves, with four pictures."""
    captions = {0: "a handwritten 7 in the upper left corner", 1: "a handwritten 1 above a handwritten 2"}
    raw = tmp_path / "raw"
    (raw / "images" / "val").mkdir(parents=True)
    for name in captions:
        (raw / "images" / "val" / f"{name}.png").write_bytes(picture())
    coco = {
        "images": [{"id": name, "file_name": f"val/{name}.png"} for name in captions],
        "annotations": [{"id": name, "image_id": name, "caption": text} for name, text in captions.items()],
    }
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "one"}]
    questions = [{"id": "0", "image": "val/0.png", "conversations": turns}]
    (raw / "captions_val.json").write_text(json.dumps(coco))
    (raw / "questions_val.json").write_text(json.dumps(questions))
    for part, answers, right in (
        ("captions", captions, 2),
        ("pretrain_captions", captions, 1),
        ("blind_captions", captions, 0),
        ("answers", {0: "one"}, 1),
    ):
        folder = tmp_path / "eval" / part
        folder.mkdir(parents=True)
        rows = [json.dumps({"id": str(name), "answer": text}) for name, text in answers.items()]
        (folder / "predictions.jsonl").write_text("\n".join(rows))
        exact = {"score": 100 * right / len(answers), "num_correct": right, "num_samples": len(answers)}
        (folder / "scores_exact.json").write_text(json.dumps(exact))
    coco_scores = {
        "metrics": {"Bleu_4": 0.9, "CIDEr": 9.5},
        "scales": {"CIDEr": "0 to 10"},
        "skipped": {"METEOR": "no Java"},
    }
    (tmp_path / "eval" / "captions" / "scores_coco.json").write_text(json.dumps(coco_scores))
    for stage in ("pretrain", "sft"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "log.jsonl").write_text(
            '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n'
        )
    return tmp_path


def quickstart_report(run):
    command = [sys.executable, ROOT / "examples" / "quickstart" / "report.py", run]
    return subprocess.run(
        command, cwd=run, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    )


def test_quickstart_report(run):
    done = quickstart_report(run)
    assert done.returncode == 0, done.stderr
    table = {
        row[0].strip(): [cell.strip() for cell in row[1:]]
        for row in (line.strip("\u2502").split("\u2502") for line in done.stdout.splitlines())
        if len(row) == 4
    }
    assert table["Captions, exact match"] == ["100.0 %", "2 of 2; bar: at least 90 %", "met"]
    assert table["with one digit"][0] == table["with two digits"][0] == "100.0 %"
    assert table["Blind control"][::2] == ["0.0 %", "met"]
    assert table["After pretraining alone"][::2] == ["50.0 %", ""]
    assert table["Answers, exact match"][0] == "100.0 %"
    assert table["Captions, METEOR"][:2] == ["-", "no Java"]
    assert table["Captions, CIDEr"][:2] == ["9.500", "0 to 10"]
    page = Tags((run / "report.html").read_text())
    assert [tag for tag, _ in page.tags].count("article") == 3
    assert "at the end 0.4" in page.texts


def test_quickstart_report_misses_a_bar(run):
    scores = run / "eval" / "blind_captions" / "scores_exact.json"
    scores.write_text(json.dumps({"score": 50.0, "num_correct": 1, "num_samples": 2}))
    done = quickstart_report(run)
    assert done.returncode == 1
    assert "missed" in done.stdout and (run / "report.html").exists()


def test_quickstart_report_of_an_unfinished_run(run):
    (run / "sft" / "log.jsonl").unlink()
    done = quickstart_report(run)
    assert done.returncode == 2
    assert done.stderr == f"report.py: {run}/sft/log.jsonl cannot be read: No such file or directory\n"
    assert not (run / "report.html").exists()
