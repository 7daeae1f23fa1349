"""RealWorldQA: what its rule makes of answers, and the files it comes in."""

import base64
import json

import pytest

from mmcore.evaluation.choice_questions import Question
from mmcore.evaluation.realworldqa import examples, read_answer, score

DIRECT = "Please answer directly with only the letter of the correct option and nothing else."
CHOICES = f"Where?\nA. Left lane\nB. Right lane.\nC. No\n{DIRECT}"


@pytest.mark.parametrize(
    ("question", "answer", "right", "parsed"),
    [
        (CHOICES, "A", "A", "A"),
        (CHOICES, "a.", "A", "A"),
        (CHOICES, "(A)", "A", "A"),
        (CHOICES, "the Left lane", "A", "A"),
        (CHOICES, "the left lane", "A", "the left lane"),  # as it is written
        (CHOICES, "Right lane.", "B", "Right lane"),  # the choice's own full stop is gone from the answer
        (CHOICES, "Not the Left lane", "A", "C"),  # "No" comes first
        (CHOICES, "B. Right lane.", "B", "B Right lane"),
        ("How many? Answer with a number.", "Two", "2", "2"),
        ("How many?", "Two.", "2", "Two"),  # numbers are spelled before punctuation goes
        ("How many?", " 2", "2", "2"),
        ("How fast?", "2.5", "25", "25"),  # sic
        ("Which way?", "downhill.", "Downhill", "Downhill"),
        ("Which way?", "", "Downhill", ""),
    ],
)
def test_the_rule(question, answer, right, parsed):
    assert read_answer(answer, Question(id="0", question=question, answer=right)) == parsed


def test_choices_in_columns():
    question = Question(id="0", question="Where?", choices=("Left", "Right"), answer="B")
    assert [read_answer(answer, question) for answer in ("Right", "b", "A")] == ["B", "B", "A"]


def test_the_archives_annotations(tmp_path):
    rows = [
        {"image": "0.webp", "question": CHOICES, "answer": "A"},
        {"image": "1.webp", "question": "?", "answer": "2"},
    ]
    data = tmp_path / "annotations.json"
    data.write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    for row in rows:
        (tmp_path / "images" / row["image"]).write_bytes(b"")
    first, second = examples(data, options={})
    assert (first.prompt, first.references, first.images) == (CHOICES, ("A",), (tmp_path / "images" / "0.webp",))
    assert (second.id, second.prompt) == ("1", "?")
    (tmp_path / "p.json").write_text(json.dumps({"0": "B", "1": "two"}))
    scores = score(tmp_path / "p.json", data, options={})
    assert (scores.metrics, scores.correct) == ({"accuracy": 50}, 1)
    assert [sample.parsed for sample in scores.samples] == ["B", "2"]
    (tmp_path / "p.json").write_text(json.dumps({"1": "2"}))
    assert score(tmp_path / "p.json", data, options={}, only=["1"]).score == 100


def test_vlmevalkits_table(tmp_path):
    picture = base64.b64encode(bytes(60)).decode()
    (tmp_path / "a.tsv").write_text(f"index\timage\tquestion\tA\tB\tanswer\n5\t{picture}\tWhere?\tLeft\tRight\tB\n")
    (example,) = examples(tmp_path / "a.tsv", options={})
    assert (example.id, example.images, example.choices) == ("5", (bytes(60),), ("A", "B"))
    assert example.prompt.startswith("Where?\nA. Left\nB. Right\n")
