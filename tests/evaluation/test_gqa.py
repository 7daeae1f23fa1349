"""GQA against the official eval.py, and its files."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation import gqa
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.short_answers import SHORT_ANSWER


def question(answer, structural, semantic, steps, words, is_balanced=True):
    return {
        "question": " ".join(["what"] * words),
        "imageId": "n1",
        "answer": answer,
        "isBalanced": is_balanced,
        "types": {"structural": structural, "semantic": semantic, "detailed": "x"},
        "semantic": [{"operation": operation, "argument": "name", "dependencies": []} for operation in steps],
        "groups": {"global": "color", "local": "x"},
        "entailed": [],
    }


QUESTIONS = {
    "201": question("yes", "verify", "obj", ["select", "exist"], 5),
    "202": question("left", "choose", "rel", ["select", "relate", "choose name"], 11),
    "203": question("dog", "query", "cat", ["select", "query"], 5),
    "204": question("red", "query", "attr", ["select", "filter color", "query"], 7),
    "205": question("no", "logical", "obj", ["select", "verify", "verify", "and"], 9),
    "206": question("no", "verify", "obj", ["select"], 9, is_balanced=False),
}
SAID = {"201": "Yes.", "202": "the left", "203": "dog..", "204": "Red", "205": "No, it is not."}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def references(write):
    return write("testdev_balanced_questions.json", QUESTIONS)


def score(predictions, references):
    return gqa.score(predictions, references, options={})


def test_scores_are_those_of_the_official_script(write, references):
    """eval_gqa.py (Video-LLaVA, commit 984e65b) printed these on the same files, LLaVA's conversion before it."""
    llava = [{"question_id": name, "text": text, "prompt": "?"} for name, text in SAID.items()]
    converted = [{"questionId": row["question_id"], "prediction": row["text"].rstrip(".").lower()} for row in llava]
    for predictions in (
        write("l.jsonl", "".join(json.dumps(row) + "\n" for row in llava)),
        write("ours.jsonl", "".join(json.dumps({"id": name, "answer": text}) + "\n" for name, text in SAID.items())),
        write("testdev_balanced_predictions.json", converted),
    ):
        scores = score(predictions, references)
        assert {name: round(value, 2) for name, value in scores.metrics.items()} == {
            "accuracy": 60.0,
            "binary": 33.33,
            "open": 100.0,
        }
        assert (scores.correct, scores.size) == (3, 5)
        groups = {kind: {name: group.score for name, group in row.items()} for kind, row in scores.groups.items()}
        assert groups == {
            "structural type": {"choose": 0, "logical": 0, "query": 100, "verify": 100},
            "semantic type": {"attribute": 100, "category": 100, "object": 50, "relation": 0},
            "steps": {"1": 100, "2": 50, "4": 0},
            "words": {"5": 100, "7": 100, "9": 0, "11": 0},
        }
        assert list(groups["words"]) == ["5", "7", "9", "11"]
    assert {sample.id: sample.parsed for sample in scores.samples}["203"] == "dog"


def test_official_predictions_count_as_they_are(write, references):
    rows = [{"questionId": name, "prediction": text} for name, text in SAID.items()]
    scores = score(write("p.json", rows), references)
    assert scores.score == 0
    assert scores.scorer == {"rule": "as written"}


def test_questions_that_are_not_balanced_do_not_count(write, references):
    rows = [{"id": name, "answer": text} for name, text in {**SAID, "206": "no"}.items()]
    scores = score(write("p.json", rows), references)
    assert (scores.score, scores.size, scores.counts["not balanced"]) == (60.0, 5, 1)
    with pytest.raises(EvaluationError, match=r"1 of 5 samples have no prediction \(201\)"):
        score(write("p.json", rows[1:5]), references)


def test_examples_find_their_pictures(write, references, tmp_path):
    write("n1.jpg", "x")
    found = gqa.examples(references, options={})
    assert [example.id for example in found] == list(SAID)
    assert (found[0].images, found[0].references) == ((tmp_path / "n1.jpg",), ("yes",))
    assert found[0].prompt == "what what what what what" + SHORT_ANSWER


def test_tables_of_hugging_face(tmp_path):
    rows = [{"id": name, **row} for name, row in QUESTIONS.items()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "questions.parquet")
    pictures = [{"id": "n1", "image": {"bytes": b"\x89PNG", "path": None}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pictures), tmp_path / "images.parquet")
    found = gqa.examples(tmp_path / "questions.parquet", tmp_path / "images.parquet", options={})
    assert (len(found), found[4].images) == (5, (b"\x89PNG",))
    answers = tmp_path / "p.json"
    answers.write_text(json.dumps(SAID))
    assert score(answers, tmp_path / "questions.parquet").metrics["open"] == 100
