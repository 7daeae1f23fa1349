"""ScienceQA in its official files, as Parquet and as results; letters as LLaVA reads them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation.scienceqa import examples, load_questions, score
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.task import read_options

TEST = {"split": "test"}


def problem(answer, **more):
    return {
        "question": "Which?",
        "choices": ["x", "y", "z"],
        "answer": answer,
        "hint": "",
        "image": None,
        "grade": "grade3",
        "subject": "natural science",
        "topic": "biology",
        "split": "test",
        **more,
    }


PROBLEMS = {
    "1": problem(0, split="train"),
    "4": problem(1, hint="Look here."),
    "5": problem(2, image="image.png", grade="grade7", subject="social science", topic="civics"),
    "11": problem(0, hint="Look.", image="image.png", grade="grade12"),
    "15": problem(0),
}


@pytest.fixture
def base(tmp_path):
    base = tmp_path / "scienceqa"
    base.mkdir()
    (base / "problems.json").write_text(json.dumps(PROBLEMS))
    (base / "pid_splits.json").write_text(
        json.dumps({"train": ["1"], "test": ["4", "5", "11", "15"], "minitest": ["5"]})
    )
    return base


def predictions(path, answers):
    rows = [{"question_id": name, "prompt": "?", "text": text} for name, text in answers.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flat(scores):
    return {kind: {name: (g.score, g.num_samples) for name, g in row.items()} for kind, row in scores.groups.items()}


def test_letters_groups_and_what_is_missing(base, tmp_path):
    path = predictions(tmp_path / "p.jsonl", {"4": "B", "5": "C. z", "11": "I think so"})
    scores = score(path, base, options=TEST)
    assert scores.metrics == {"accuracy": 50, "accuracy_img": 50}
    assert (scores.score, scores.correct, scores.size) == (50, 2, 4)
    assert scores.counts == {"empty": 0, "missing": 1, "repeated": 0, "unparsed": 1}
    assert flat(scores) == {
        "subject": {"natural science": (pytest.approx(100 / 3), 3), "social science": (100, 1)},
        "comes with": {"TXT": (50, 2), "IMG": (50, 2), "NO": (0, 1)},
        "grade": {"G1-6": (50, 2), "G7-12": (50, 2)},
        "topic": {"biology": (pytest.approx(100 / 3), 3), "civics": (100, 1)},
    }
    assert set(scores.statistics) == set(scores.metrics) == set(scores.scales)


def test_official_results_are_numbers_of_choices(base, tmp_path):
    results = {"acc": 75.0, "results": {"4": 1, "5": 2, "11": -1, "15": 0}, "outputs": {"4": "The answer is A."}}
    (tmp_path / "r.json").write_text(json.dumps(results))
    scores = score(tmp_path / "r.json", base, options=TEST)
    assert (scores.score, scores.counts["empty"]) == (75, 1)
    (tmp_path / "r.json").write_text('{"results": {"4": "B"}}')
    with pytest.raises(ValueError, match="results are numbers of choices, but that of 4 is 'B'"):
        score(tmp_path / "r.json", base, options=TEST)


def test_splits(base, tmp_path):
    assert [q.id for q in load_questions(base, TEST)] == ["4", "5", "11", "15"]
    assert [q.id for q in load_questions(base, {"split": "minitest"})] == ["5"]
    (base / "pid_splits.json").unlink()
    assert [q.id for q in load_questions(base / "problems.json", {"split": "train"})] == ["1"]
    with pytest.raises(ValueError, match=r"no questions of the split val, and there is no pid_splits.json"):
        load_questions(base, {"split": "val"})
    assert read_options("scienceqa") == TEST


@pytest.mark.parametrize("root", ["images/test", "images", "test", "."])
def test_examples_ask_as_llava_does(base, root):
    """Prompts of LLaVA's llava_test_CQM-A.json: all 4241 are equal to these (checked with the published file)."""
    for name in ("5", "11"):
        (base / root / name).mkdir(parents=True)
        (base / root / name / "image.png").write_bytes(b"")
    first, second, *_ = examples(base, options=TEST) if root != "test" else examples(base, base, options=TEST)
    assert first.prompt == (
        "Context: Look here.\nWhich?\nA. x\nB. y\nC. z\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (first.images, first.references, first.choices) == ((), ("B",), ("A", "B", "C"))
    assert second.images == (base / root / "5" / "image.png",)
    assert second.prompt.startswith("Which?\nA. x")
    assert examples(base, base / root, options=TEST)[1].images == second.images


def test_parquet_files_of_a_split(tmp_path):
    rows = [problem(1, image={"bytes": b"x", "path": None}), problem(0)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "validation-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "test-00000-of-00001.parquet")
    assert [question.id for question in load_questions(tmp_path, TEST)] == ["0"]
    first, second = examples(tmp_path, options={"split": "val"})
    assert (first.id, first.images, second.id, second.images) == ("0", (b"x",), "1", ())
    path = predictions(tmp_path / "p.jsonl", {"0": "A", "1": "A"})
    scores = score(path, tmp_path, options={"split": "val"})
    assert scores.metrics == {"accuracy": 50, "accuracy_img": 0}


def test_vlmevalkits_table(tmp_path):
    (tmp_path / "ScienceQA_TEST.tsv").write_text(
        "index\tquestion\thint\tA\tB\tC\tanswer\n9\tWhich?\tLook.\tx\ty\t\tB\n"
    )
    path = predictions(tmp_path / "p.jsonl", {"9": "B"})
    assert score(path, tmp_path / "ScienceQA_TEST.tsv", options=TEST).metrics == {"accuracy": 100}


def test_some_of_the_examples_alone(base, tmp_path):
    path = predictions(tmp_path / "p.jsonl", {"4": "B"})
    scores = score(path, base, options=TEST, only=["4"])
    assert (scores.metrics, scores.size) == ({"accuracy": 100}, 1)


def test_files_of_something_else(base, tmp_path):
    with pytest.raises(EvaluationError, match=r"do not have \(1\)"):
        score(predictions(tmp_path / "p.jsonl", {"4": "B", "1": "A"}), base, options=TEST)
    with pytest.raises(EvaluationError, match="4 of 4 samples have no prediction"):
        score(predictions(tmp_path / "p.jsonl", {}), base, options=TEST)
    (base / "pid_splits.json").write_text(json.dumps({"test": ["4", "77"]}))
    with pytest.raises(ValueError, match=r"lacks 1 of 2 questions .* the first is 77"):
        load_questions(base, TEST)
    (base / "pid_splits.json").unlink()
    (base / "problems.json").write_text(json.dumps({"4": {"split": "test", "question": "?"}}))
    with pytest.raises(ValueError, match=r"4 is no problem of ScienceQA .* it has question, split"):
        load_questions(base, TEST)
    (base / "problems.json").unlink()
    with pytest.raises(ValueError, match="is a folder without Parquet files"):
        load_questions(base, TEST)
