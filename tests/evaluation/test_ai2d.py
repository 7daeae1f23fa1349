"""AI2D as Parquet, and unpacked from the Allen Institute's archive."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation.ai2d import examples, load_questions, score
from mmcore.evaluation.scores import EvaluationError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "ai2d"
    for name in ("images/0.png", "images/10.png", "images/2.png", "abc_images/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "questions").mkdir()
    for name in ("10", "2", "0"):
        questions = {
            f"What is A in {name}?": {
                "abcLabel": True,
                "answerTexts": ["ears", "nose", "mouth"],
                "correctAnswer": 1,
                "questionId": f"{name}.png-0",
            },
            "What else?": {
                "abcLabel": False,
                "answerTexts": ["a", "b"],
                "correctAnswer": 0,
                "questionId": f"{name}.png-1",
            },
        }
        content = {"imageName": f"{name}.png", "questions": questions}
        (folder / "questions" / f"{name}.png.json").write_text(json.dumps(content))
    (folder / "categories.json").write_text(json.dumps({"2.png": "partsOfA", "10.png": "foodChainsWebs"}))
    (tmp_path / "ai2d_test_ids.csv").write_text("2\n10\n")
    return folder


def test_the_archives_test_set(folder, tmp_path):
    found = examples(folder, options={})
    assert [example.id for example in found] == ["2.png-0", "2.png-1", "10.png-0", "10.png-1"]
    assert found[0].prompt == (
        "What is A in 2?\nA. ears\nB. nose\nC. mouth\nAnswer with the option's letter from the given choices directly."
    )
    assert (found[0].references, found[0].choices) == (("B",), ("A", "B", "C"))
    names = ["abc_images/2.png", "images/2.png", "images/10.png", "images/10.png"]
    assert [example.images for example in found] == [(folder / name,) for name in names]
    assert examples(folder, folder / "images", options={}) == found
    (tmp_path / "ai2d_test_ids.csv").unlink()
    assert len(load_questions(folder)) == 6


def test_scores_by_category(folder, tmp_path):
    answers = {"2.png-0": "B", "2.png-1": "(a)", "10.png-0": "The answer is B", "10.png-1": "A. a"}
    (tmp_path / "p.json").write_text(json.dumps(answers))
    scores = score(tmp_path / "p.json", folder, options={})
    assert (scores.metrics, scores.correct, scores.counts["unparsed"]) == ({"accuracy": 75}, 3, 1)
    groups = {name: (group.score, group.num_samples) for name, group in scores.groups["category"].items()}
    assert groups == {"partsOfA": (100, 2), "foodChainsWebs": (50, 2)}
    (tmp_path / "p.json").write_text(json.dumps({"2.png-0": "B"}))
    assert score(tmp_path / "p.json", folder, options={}, only=["2.png-0"]).score == 100
    with pytest.raises(EvaluationError, match="3 of 4 samples have no prediction"):
        score(tmp_path / "p.json", folder, options={})


def test_parquet_files_number_their_options(tmp_path):
    rows = [{"question": "Which?", "options": ["a", "b", "c"], "answer": "2", "image": {"bytes": b"x", "path": None}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    (example,) = examples(tmp_path, options={})
    assert (example.id, example.references, example.images) == ("0", ("C",), (b"x",))
    (tmp_path / "p.jsonl").write_text('{"id": "0", "answer": "c."}')
    assert score(tmp_path / "p.jsonl", tmp_path, options={}).score == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "has no questions: it has a"),
        ({"questions": {"Which?": {"abcLabel": True}}}, "'Which\\?' has no answerT"),
    ],
)
def test_questions_of_something_else(tmp_path, content, message):
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "0.png.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path)
