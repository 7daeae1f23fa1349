"""What `mmcore evaluate` leaves and `mmcore report` reads: whole or not at all, every text as it was."""

import json
from pathlib import Path

import pytest

from mmcore.evaluation.scored_run import (
    beside,
    load_prompts,
    read_runs,
    run_names,
    samples_file,
    scores_files,
    with_pictures,
    with_questions,
)
from mmcore.evaluation.scores import Sample, best, sha256, shown, write_together

ODD = 'a\u2028b\x85c\n"\\ \ud800 \u4e2d'


def content(task: str = "exact-match", **changes: object) -> dict[str, object]:
    whole = {
        "task": task,
        "score": 50.0,
        "num_samples": 2,
        "num_correct": 1,
        "metric": "exact_match",
        "metrics": {"exact_match": 50.0},
        "scales": {"exact_match": "percent"},
    }
    return whole | changes


def write_run(folder: Path, samples: list[Sample], **changes: object) -> Path:
    rows, file = samples_file(samples), folder / "scores.json"
    (folder / "samples.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_bytes(rows)
    digest = sha256(folder / "samples.jsonl")
    file.write_text(json.dumps(content(samples={"file": "samples.jsonl", "sha256": digest}, **changes)))
    return file


def test_names_of_the_files_beside():
    assert beside(Path("x/scores.json")) == (Path("x/samples.jsonl"), Path("x/report.html"))
    assert beside(Path("x/scores_coco.json")) == (
        Path("x/scores_coco.samples.jsonl"),
        Path("x/scores_coco.report.html"),
    )


def test_samples_come_back_as_they_were(tmp_path):
    samples = [
        Sample(id="1", score=0.3, answer=ODD, parsed=ODD, references=(ODD, "b"), group=ODD, prompt=ODD),
        Sample(id="2", score=1.0, answer="", images=(tmp_path / "a.png", b"")),
    ]
    (run,) = read_runs([write_run(tmp_path, samples)])
    assert run.task == "exact-match" and run.name == tmp_path.name
    assert list(run.samples.values()) == samples
    assert len((tmp_path / "samples.jsonl").read_bytes().split(b"\n")) == 3
    assert "\u4e2d".encode() in (tmp_path / "samples.jsonl").read_bytes()


def test_samples_of_another_run_are_refused(tmp_path):
    file = write_run(tmp_path, [Sample(id="1", score=1.0, answer="x")])
    (tmp_path / "samples.jsonl").write_bytes(samples_file([Sample(id="1", score=0.0, answer="y")]))
    with pytest.raises(ValueError, match=r"samples\.jsonl is not the one that .*scores\.json was written with"):
        read_runs([file])
    (tmp_path / "samples.jsonl").unlink()
    assert read_runs([file])[0].samples == {}


@pytest.mark.parametrize("text", ["{}", "[]", "{", json.dumps(content(metric="accuracy"))])
def test_what_is_no_scores_file(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=r"scores\.json is not (JSON|what mmcore evaluate writes)"):
        read_runs([tmp_path / "scores.json"])


def test_a_folder_means_its_scores_and_a_run_counts_once(tmp_path):
    assert scores_files([tmp_path, tmp_path / "x.json"]) == [tmp_path / "scores.json", tmp_path / "x.json"]
    with pytest.raises(ValueError, match="given more than once"):
        scores_files([tmp_path, tmp_path / "scores.json"])


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["/r/a/scores.json", "/r/b/scores.json"], ["a", "b"]),
        (["/r/a/eval/scores.json", "/r/b/eval/scores.json"], ["a/eval", "b/eval"]),
        (["/r/a/x.json", "/r/a/y.json"], ["x.json", "y.json"]),
        (["/r/a/x.json", "/r/a/scores.json"], ["x.json", "a"]),
        (["/scores.json"], ["scores.json"]),
        (["/scores.json", "/a/scores.json"], ["scores.json", "a"]),
    ],
)
def test_runs_have_the_shortest_names_that_tell_them_apart(files, names):
    assert run_names([Path(file) for file in files]) == names


@pytest.fixture
def questions(tmp_path):
    """LLaVA's form, one question with a picture and one without."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": 1, "image": "1.png", "conversations": turns}, {"id": 2, "conversations": turns}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    (tmp_path / "1.png").write_text("")
    return tmp_path / "q.json"


SAMPLES = [Sample(id=name, score=1.0, answer="a") for name in ("1", "2", "3")]


def test_samples_get_prompts_and_pictures(questions):
    found, problem = with_questions("exact-match", SAMPLES, questions, None, {}, {"2": "As asked."})
    assert problem == ""
    assert [(sample.prompt, sample.images) for sample in found] == [
        ("What?", (questions.parent / "1.png",)),
        ("As asked.", ()),
        ("", ()),
    ]


def test_without_pictures_it_is_said_why_and_prompts_stay(questions):
    (questions.parent / "1.png").unlink()
    found, problem = with_questions("exact-match", SAMPLES, questions, None, {}, {"1": "As asked."})
    assert "1 of 1 pictures are missing" in problem
    assert [sample.prompt for sample in found] == ["As asked.", "", ""]
    _, problem = with_questions("exact-match", [Sample(id="x", score=1.0, answer="")], questions, None, {})
    assert "1 of 1 pictures are missing" in problem
    (questions.parent / "1.png").write_text("")
    _, problem = with_questions("exact-match", [Sample(id="x", score=1.0, answer="")], questions, None, {})
    assert problem.startswith("the samples have other ids than the questions")


def test_prompts_are_those_of_mmcore_generate(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": 1, "prompt": "a", "answer": ""}\n{"question_id": 2, "text": ""}\n{"id": 3, "prompt": 4}\n')
    assert load_prompts(file) == {"1": "a"}
    assert load_prompts(tmp_path / "folder") == {}


def test_pictures_inside_the_benchmarks_file_are_read_anew(tmp_path, questions):
    source = {"data": str(questions), "images": None, "options": {}}
    runs = read_runs(
        [
            write_run(tmp_path / name, [Sample(id="1", score=1.0, answer=name, images=images)], examples=source)
            for name, images in (("a", (b"",)), ("b", ()))
        ]
    )
    found, problem = with_pictures(runs)
    assert problem == ""
    assert [run.samples["1"].images for run in found] == [(tmp_path / "1.png",)] * 2
    assert [run.samples["1"].prompt for run in found] == ["What?"] * 2
    questions.unlink()
    found, problem = with_pictures(runs)
    assert "cannot be read" in problem and [run.samples["1"].answer for run in found] == ["a", "b"]


def test_files_are_written_together_or_not_at_all(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("before")
    with pytest.raises(ValueError, match="b cannot be written: Is a directory"):
        write_together({tmp_path / "a": b"after", tmp_path / "b": b"", tmp_path / "c": b""})
    assert (tmp_path / "a").read_text() == "before"
    with pytest.raises(ValueError, match=r"a/d cannot be written: (Not a directory|File exists)"):
        write_together({tmp_path / "c": b"", tmp_path / "a" / "d": b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    write_together({tmp_path / "a": b"after", tmp_path / "new" / "c": b"too"})
    assert ((tmp_path / "a").read_text(), (tmp_path / "new" / "c").read_text()) == ("after", "too")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c", "new"]


@pytest.mark.parametrize(
    ("scale", "highest", "text"),
    [
        ("percent", 100, "0.50"),
        ("0 to 1", 1, "0.5000"),
        ("0 to 10", 10, "0.5000"),
        ("0 to 2800", 2800, "0.50"),
        ("right answers, of 1000", float("inf"), "0.50"),
    ],
)
def test_scales(scale, highest, text):
    assert (best(scale), shown(0.5, scale)) == (highest, text)
