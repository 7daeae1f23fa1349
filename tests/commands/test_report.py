"""`mmcore report` as a user runs it: after `mmcore evaluate`, of one task or several, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmcore.commands.report import ReportConfig, main

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden"
NUM_SAMPLES = 40

# Fails when torch is imported: scores need none of it.
NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        assert name.split(".")[0] != "torch", "torch was imported"
sys.meta_path.insert(0, Refuse())
from mmcore.__main__ import main
sys.exit(main())
"""


def mmcore(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def runs(tmp_path):
    """Two scored runs of questions about pictures: a is right about every fourth, b about every second."""
    questions = [
        {
            "id": row,
            "image": f"{row}.png",
            "conversations": [{"from": "human", "value": f"Is it {row}?"}, {"from": "gpt", "value": "yes"}],
        }
        for row in range(NUM_SAMPLES)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "images").mkdir()
    for row in range(NUM_SAMPLES):
        Image.new("RGB", (8, 8), (row, 0, 0)).save(tmp_path / "images" / f"{row}.png")
    for name, every in (("a", 4), ("b", 2)):
        rows = [{"id": row, "answer": "no" if row % every else "yes"} for row in range(NUM_SAMPLES)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ["--predictions", tmp_path / f"{name}.jsonl", "--references", tmp_path / "questions.json"]
        done = mmcore("evaluate", "exact-match", *files, "--output", tmp_path / name / "scores.json")
        assert (done.returncode, done.stderr) == (0, "")
    return tmp_path


def test_two_runs(runs):
    output = runs / "report.html"
    done = mmcore("report", runs / "a", runs / "b" / "scores.json", "--output", output, "--gallery", 12)
    assert (done.returncode, done.stderr) == (0, "")
    # Ten samples that only b has right, of 40: 2 / 2^10.
    assert re.search(r"b less a: 25\.00 \(1\d\.\d\d to [34]\d\.\d\d\), p = 0\.0020\n", done.stdout)
    assert done.stdout.endswith(f"{output}\n")
    page = output.read_text()
    assert page.count("<article") == page.count("<img") == 12
    assert page.count('data-kind="second"') == 10
    assert "12 of 40 samples, chosen by chance." in page


def test_runs_of_several_tasks_and_one_without_samples(runs):
    scores = json.loads((runs / "a" / "scores.json").read_text())
    (runs / "other.json").write_text(json.dumps(scores | {"task": "pope"}))
    (runs / "bare.json").write_text(json.dumps({name: value for name, value in scores.items() if name != "samples"}))
    done = mmcore("report", runs / "a", runs / "bare.json", runs / "other.json", "--output", runs / "report.html")
    assert done.returncode == 0, done.stderr
    assert "Of bare.json no samples were kept" in done.stderr and "Of other.json no samples were kept" in done.stderr
    page = (runs / "report.html").read_text()
    assert '<h1 class="another">exact-match</h1>' in page and '<h1 class="another">pope</h1>' in page
    assert page.count('<section class="browser">') == 1 and "<h2>Differences</h2>" not in page


def test_pictures_that_are_gone_are_said(runs):
    for path in (runs / "images").iterdir():
        path.unlink()
    done = mmcore("report", runs / "a", "--output", runs / "report.html")
    assert done.returncode == 0, done.stderr
    page = (runs / "report.html").read_text()
    assert "<img" not in page and "40 pictures cannot be shown, the first: " in page and "No such file" in page


def test_mistakes(runs):
    before = sorted(runs.rglob("*"))
    for arguments, message in (
        (["a", "a/scores.json", "--output", "x.html"], "a/scores.json is given more than once"),
        (["a", "--output", "a/report.html"], "--output .*a/report.html would overwrite a run's own file"),
        (["images", "--output", "x.html"], "scores .*images/scores.json cannot be read: No such file or directory"),
        (["questions.json", "--output", "x.html"], "questions.json is not what mmcore evaluate writes"),
        (["a", "--output", "images"], "images cannot be written: Is a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            main([name if name[0] == "-" else str(runs / name) for name in arguments])
    with pytest.raises(ValueError, match="--gallery must not be negative, but is -1"):
        ReportConfig(runs=(runs / "a",), output=runs / "x.html", gallery=-1)
    assert sorted(runs.rglob("*")) == before
    done = mmcore("report", "--output", runs / "x.html")
    assert done.returncode == 2 and "give the runs" in done.stderr and "Traceback" not in done.stderr


def test_help():
    done = mmcore("report", "--help")
    assert done.returncode == 0 and "usage: mmcore report" in done.stdout
    assert "report" in mmcore("--help").stdout


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden beside the project")
def test_page_of_real_pictures(tmp_path):
    """Photos of COCO with captions of people, whose first stands for the answer."""
    folder = GOLDEN / "coco_mini_images"
    rows = json.loads((folder / "annotations.json").read_text())
    references = [
        {"image_id": row["image_id"], "image": row["file_name"], "caption": row["captions"][1:]} for row in rows
    ]
    (tmp_path / "r.json").write_text(json.dumps(references))
    answers = [{"id": row["image_id"], "answer": row["captions"][0]} for row in rows]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    files = ["--predictions", tmp_path / "p.jsonl", "--references", tmp_path / "r.json", "--images", folder]
    written = ["--output", tmp_path / "scores.json", "--gallery", 10]
    done = mmcore("evaluate", "coco", *files, *written, PATH="")  # without Java it is quick
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert page.count("<article") == page.count('<img alt="" src="data:image/jpeg;base64,') == 10
    assert len(page) < 600_000
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert row["images"] == [str(folder / rows[0]["file_name"])] and row["references"] == rows[0]["captions"][1:]
