"""`mmcore evaluate` as a user runs it: exit codes, messages, scores.json."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REFERENCES = {
    "images": [{"id": 1}, {"id": 2}],
    "annotations": [
        {"id": 1, "image_id": 1, "caption": "A cat sits on the mat."},
        {"id": 2, "image_id": 2, "caption": "Two dogs run."},
        {"id": 3, "image_id": 2, "caption": "Dogs in a park."},
    ],
}


@pytest.fixture
def files(tmp_path):
    predictions, references = tmp_path / "predictions.jsonl", tmp_path / "references.json"
    references.write_text(json.dumps(REFERENCES))
    rows = [{"id": "1", "answer": "A cat sits on the mat."}, {"id": "2", "answer": "Two dogs walk."}]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return predictions, references, tmp_path / "out" / "scores.json"


def evaluate(task, files, *options, **environment):
    predictions, references, output = files
    command = [
        sys.executable,
        "-m",
        "mmcore",
        "evaluate",
        task,
        "--predictions",
        predictions,
        "--references",
        references,
    ]
    return subprocess.run(
        [*command, "--output", output, *options],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_exact_match(files):
    done = evaluate("exact-match", files)
    assert done.returncode == 0, done.stderr
    page = files[2].with_name("report.html")
    problem = f"{files[1]}: picture 1 (row 0, from 0) has no file name to load it from"
    assert done.stderr == f"mmcore evaluate: {page} has no pictures: {problem}\n"
    assert "50.00" in done.stdout
    scores = json.loads(files[2].read_text())
    assert list(scores)[:4] == ["task", "score", "num_samples", "num_correct"]
    assert (scores["task"], scores["score"], scores["num_samples"], scores["num_correct"]) == (
        "exact-match",
        50.0,
        2,
        1,
    )
    assert scores["scales"] == {"exact_match": "percent"}
    for role, path in zip(("predictions", "references"), files[:2], strict=True):
        assert scores["inputs"][role] == {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert sorted(path.name for path in files[2].parent.iterdir()) == ["report.html", "samples.jsonl", "scores.json"]
    samples = [json.loads(line) for line in files[2].with_name("samples.jsonl").read_text().splitlines()]
    assert [(row["id"], row["score"], row["answer"]) for row in samples] == [
        ("1", 1.0, "A cat sits on the mat."),
        ("2", 0.0, "Two dogs walk."),
    ]
    assert samples[1]["references"] == ["Two dogs run.", "Dogs in a park."]
    digest = hashlib.sha256(files[2].with_name("samples.jsonl").read_bytes()).hexdigest()
    assert scores["samples"] == {"file": "samples.jsonl", "sha256": digest}
    assert page.read_text().count("<article") == 2 and f"No pictures: {problem}" in page.read_text()


def test_captions_without_java_go_on_and_say_so(files):
    done = evaluate("coco", files, PATH="")
    assert done.returncode == 0, done.stderr
    scores = json.loads(files[2].read_text())
    assert scores["score"] == scores["metrics"]["CIDEr"] > 0
    assert list(scores["metrics"]) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert "num_correct" not in scores
    assert scores["scorer"] == {"mmcore": "0.1.0", "pycocoevalcap": "1.2", "tokenizer": "python"}
    assert set(scores["skipped"]) == {"METEOR", "PTB tokenizer"}
    assert "METEOR left out: no Java runtime" in done.stderr
    assert "PTB tokenizer left out: no Java runtime" in done.stderr


def test_predictions_of_another_set_have_no_score(files):
    files[0].write_text('{"id": "1", "answer": "x"}\n{"id": "3", "answer": "y"}\n')
    done = evaluate("exact-match", files)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "1 of 2 samples have no prediction (2); 1 of 2 predictions are for samples" in done.stderr
    assert not files[2].parent.exists()


def test_a_users_mistake_is_one_paragraph(files):
    files[0].unlink()
    done = evaluate("exact-match", files)
    assert done.returncode == 2
    assert done.stderr == f"mmcore evaluate: predictions {files[0]} cannot be read: No such file or directory\n"
    assert not files[2].parent.exists()


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("cocoo", [], "did you mean 'coco'"),
        ("coco", ["--tokenizer", "perl"], "perl"),
        ("coco", ["--tokeniser", "ptb"], "--tokeniser"),
    ],
)
def test_wrong_usage(files, task, options, message):
    done = evaluate(task, files, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_output_never_overwrites_an_input(files):
    """Nor does what appears beside it."""
    before = files[0].read_bytes()
    assert evaluate("exact-match", (*files[:2], files[0])).returncode == 2
    samples = files[0].rename(files[0].with_name("samples.jsonl"))
    done = evaluate("exact-match", (samples, files[1], samples.with_name("scores.json")))
    assert done.returncode == 2 and "would overwrite the predictions" in " ".join(done.stderr.split())
    assert samples.read_bytes() == before and len([*samples.parent.iterdir()]) == 2


def test_a_page_that_cannot_be_written_leaves_no_scores(files):
    files[2].with_name("report.html").mkdir(parents=True)
    done = evaluate("exact-match", files)
    assert done.returncode == 2 and "report.html cannot be written: Is a directory" in done.stderr
    assert [path.name for path in files[2].parent.iterdir()] == ["report.html"]


def test_other_names_stand_beside_each_other(files):
    for name in ("one.json", "two.json"):
        assert evaluate("exact-match", (*files[:2], files[2].with_name(name)), "--gallery", "0").returncode == 0
    assert sorted(path.name for path in files[2].parent.iterdir()) == sorted(
        f"{name}.{kind}" for name in ("one", "two") for kind in ("json", "samples.jsonl", "report.html")
    )
    assert "<article" not in files[2].with_name("one.report.html").read_text()


def test_torch_is_never_imported(files):
    code = (
        "import sys; from mmcore.commands.evaluate import main; "
        f"code = main(['coco', '--predictions', {str(files[0])!r}, '--references', {str(files[1])!r}, "
        f"'--output', {str(files[2])!r}]); "
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PATH": "", "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0
