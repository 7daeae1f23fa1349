"""Letters out of answers, by the rule of each benchmark; rows and pictures of the tables they come in."""

import base64
import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation.choice_questions import (
    Question,
    as_examples,
    cells,
    find_pictures,
    lettered,
    named,
    read_shards,
    table_questions,
)
from mmcore.evaluation.metrics.choices import first_letter, leading_letter, llava_letter, load_answers, score_answers
from mmcore.evaluation.scores import EvaluationError

PICTURE = b"\x89PNG" + bytes(range(200))


@pytest.mark.parametrize(
    ("answer", "llava", "leading", "first"),
    [
        ("B", "B", "B", "B"),
        ("b", "", "B", "B"),
        ("B.", "", "B", "B"),
        ("B. a cat", "B", "B", "B"),
        ("B.a cat", "", "B", "B"),
        ("(B)", "", "B", ""),
        (" B", "", "", "B"),
        (" B. a cat", "", "B", "B"),
        ("B a cat", "", "", "B"),
        ("The answer is B.", "B", "", ""),
        ("So: The answer is B, I think", "B", "", ""),
        ("The answer is B", "", "", ""),  # the rule wants one more character
        ("The answer is B\n", "", "", ""),
        (
            "The answer is A. The answer is B.",
            "",
            "",
            "",
        ),
        ("D", "", "", ""),  # there are three choices
        ("D. a cat. The answer is B.", "", "", ""),
        ("E", "", "", ""),
        ("", "", "", ""),
    ],
)
def test_letters_by_rule(answer, llava, leading, first):
    assert (llava_letter(answer, "ABC"), leading_letter(answer, "ABC"), first_letter(answer, "ABC")) == (
        llava,
        leading,
        first,
    )


def test_questions_are_asked_as_llava_asks():
    assert lettered("What?", ["a cat", "a dog"]) == (
        "What?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly."
    )


def test_pictures_of_a_cell():
    text = base64.b64encode(PICTURE).decode()
    assert cells(text) == cells(PICTURE) == cells({"bytes": PICTURE, "path": "a.png"}) == (PICTURE,)
    assert cells(["a.png", {"bytes": None, "path": "b.png"}, text]) == ("a.png", "b.png", PICTURE)
    assert cells("folder/" + 80 * "x" + ".png") == ("folder/" + 80 * "x" + ".png",)
    assert cells("folder_" + 80 * "x") == ("folder_" + 80 * "x",)  # no base64
    assert cells(None) == cells("") == cells([]) == cells({"bytes": b"", "path": ""}) == ()


def test_pictures_by_name_and_by_content(tmp_path):
    for name in ("images/a.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    data = tmp_path / "data.json"
    paths = find_pictures(data, None, [("a.png",), (), (PICTURE, "a.png")])
    assert paths == [(tmp_path / "images/a.png",), (), (PICTURE, tmp_path / "images/a.png")]
    assert find_pictures(tmp_path, None, [("b.png",)]) == [(tmp_path / "b.png",)]
    assert named(data, None, [None, "x/a.png"], [None, "a.png"]) == [None, "a.png"]
    assert named(data, tmp_path, ["x/b.png"], ["y/b.png"]) == ["x/b.png"]
    with pytest.raises(ValueError, match=r"1 of 2 pictures are missing, the first is .*images/c.png"):
        find_pictures(tmp_path, None, [("a.png", "c.png")])


def test_tables_of_lmms_lab_and_of_vlmevalkit(tmp_path):
    row = {"question": " What? ", "options": ["a", "b"], "answer": "1", "image": {"bytes": PICTURE, "path": None}}
    for number in range(2):
        table = pyarrow.Table.from_pylist([row] * 2)
        pyarrow.parquet.write_table(table, tmp_path / f"test-0000{number}-of-00002.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train-00000-of-00001.parquet")
    found = table_questions(read_shards(tmp_path, "references", "test"))
    assert [question.id for question in found] == ["0", "1", "2", "3"]
    assert found[3] == Question(id="3", question="What?", choices=("a", "b"), answer="B", pictures=(PICTURE,))
    assert table_questions(read_shards(tmp_path, "references", "test"), pictures=False)[0].pictures == ()

    text = base64.b64encode(PICTURE).decode()
    (tmp_path / "a.tsv").write_text(
        f"index\tquestion\thint\tA\tB\tC\tanswer\tcategory\timage\n"
        f"7\tWhat?\tLook.\tNone\tNA\t\tB\tbirds\t{text}\n"
        f"8\tWhich?\t\tx\ty\tz\tC\tfish\t7\n"
    )
    assert table_questions(read_shards(tmp_path / "a.tsv", "references")) == [
        Question(
            id="7",
            question="Look.\nWhat?",
            choices=("None", "NA"),
            answer="B",
            pictures=(PICTURE,),
            groups={"category": ("birds",)},
        ),
        Question(
            id="8",
            question="Which?",
            choices=("x", "y", "z"),
            answer="C",
            pictures=(PICTURE,),
            groups={"category": ("fish",)},
        ),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"answer": "A"}], "row 0 has no question: it has answer"),
        ([[1]], r"row 0 has no question: it is \[1\]"),
        ([{"question": "a", "index": 1}] * 2, "question 1 is there twice"),
        ([], "there are no questions"),
    ],
)
def test_tables_that_are_something_else(tmp_path, content, message):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        table_questions(read_shards(tmp_path / "a.json", "references"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a folder without Parquet files"):
        list(read_shards(tmp_path / "empty", "references"))


QUESTIONS = [
    Question(id="1", question="?", choices=("x", "y"), answer="A", groups={"kind": ("p",), "more": ("q", "r")}),
    Question(id="2", question="?", choices=("x", "y"), answer="B", groups={"kind": ("p",), "more": ("q",)}),
    Question(id="3", question="?", choices=("x", "y"), answer="B", groups={"kind": ("s",)}),
]


def test_the_share_of_right_answers(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question_id": 1, "prediction": "A"}\n{"question_id": 2, "prediction": "so"}\n')
    found = load_answers(path, QUESTIONS, tmp_path, missing="empty")
    scores = score_answers(QUESTIONS, found, lambda answer, question: llava_letter(answer, question.letters), scorer={})
    assert scores.metrics == {"accuracy": 1 / 3 * 100}  # official scripts multiply last
    assert (scores.correct, scores.size) == (1, 3)
    assert scores.counts == {"empty": 0, "missing": 1, "repeated": 0, "unparsed": 1}
    assert {
        kind: {name: (g.score, g.num_samples) for name, g in row.items()} for kind, row in scores.groups.items()
    } == {
        "kind": {"p": (50, 2), "s": (0, 1)},
        "more": {"q": (50, 2), "r": (100, 1)},
    }
    assert [(sample.parsed, sample.group) for sample in scores.samples] == [("A", "p"), ("", "p"), ("", "s")]
    assert scores.intervals()["accuracy"] == (0, 100)


def test_predictions_of_vlmevalkit_are_not_its_right_answers(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text("index\tquestion_id\tanswer\tprediction\n1\t1\tA\tB\n2\t2\tB\tB\n3\t3\tB\tA\n")
    assert list(load_answers(path, QUESTIONS, tmp_path).answers.values()) == ["B", "B", "A"]


def test_answers_that_are_passed_over_and_those_that_are_foreign(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"1": "A", "2": "B", "3": "B"}))
    found = load_answers(path, QUESTIONS[:2], tmp_path, others=["3", "4"])
    assert (found.answers, found.counts["missing"]) == ({"1": "A", "2": "B"}, 0)
    with pytest.raises(EvaluationError, match=r"1 of 3 predictions are for samples .*\(3\)"):
        load_answers(path, QUESTIONS[:2], tmp_path)
    with pytest.raises(ValueError, match="answers are not public"):
        load_answers(path, [Question(id="1", question="?", answer="")], tmp_path)


def test_examples_choose_among_letters(tmp_path):
    (example,) = as_examples(tmp_path, None, [QUESTIONS[0]])
    assert (example.choices, example.references, example.images) == (("A", "B"), ("A",), ())
    (bare,) = as_examples(tmp_path, None, [Question(id="1", question="How many?", answer="2")])
    assert (bare.prompt, bare.choices, bare.references) == ("How many?", (), ("2",))
