"""ChartQA's relaxed accuracy, and its files."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation import chartqa
from mmcore.evaluation.short_answers import SHORT_ANSWER

HUMAN = [
    {"imgname": "1.png", "query": "How many?", "label": "14"},
    {"imgname": "1.png", "query": "More?", "label": "No"},
]
AUGMENTED = [{"imgname": "2.png", "query": "What share?", "label": "41.5"}]
ANSWERS = '{"id": 0, "answer": "14.7"}\n{"id": 1, "answer": "Yes"}\n{"id": 2, "answer": " 40 "}\n'


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("14.7", "14", True),
        ("14.71", "14", False),
        ("13.3", "14", True),
        ("13.29", "14", False),
        ("-10", "-10.4", True),
        ("5%", "0.05", True),
        ("5%", "5", False),
        ("5%", "5%", True),
        ("0", "0", True),
        ("0.0", "0", False),
        ("1,000", "1000", False),
        ("yes", "Yes", True),
        (" Yes\n", "yes", True),
        ("Yes.", "Yes", False),
        ("nan", "nan", False),
        ("14", "fourteen", False),
    ],
)
def test_the_rule_of_pix2struct(answer, right, expected):
    """Each as relaxed_correctness (google-research/pix2struct, commit 945f27e) gave it when it was run."""
    assert chartqa.is_right(answer, right) is expected


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "test"
    (folder / "png").mkdir(parents=True)
    for name in ("1.png", "2.png"):
        (folder / "png" / name).write_bytes(b"x")
    (folder / "test_human.json").write_text(json.dumps(HUMAN))
    (folder / "test_augmented.json").write_text(json.dumps(AUGMENTED))
    return folder


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(ANSWERS)
    return path


def test_both_splits(folder, answers):
    scores = chartqa.score(answers, folder, options={})
    assert scores.metrics == {
        "relaxed_accuracy": pytest.approx(200 / 3),
        "human": pytest.approx(50),
        "augmented": pytest.approx(100),
    }
    assert {name: (group.score, group.num_samples) for name, group in scores.groups["split"].items()} == {
        "augmented": (100, 1),
        "human": (50, 2),
    }
    assert (scores.correct, set(scores.intervals())) == (2, {"relaxed_accuracy", "human", "augmented"})
    found = chartqa.examples(folder, options={})
    assert [example.id for example in found] == ["0", "1", "2"]
    assert (found[2].images, found[2].references) == ((folder / "png" / "2.png",), ("41.5",))
    assert found[2].prompt == "What share?" + SHORT_ANSWER


def test_one_split(folder, answers):
    (folder / "p.jsonl").write_text("".join(line + "\n" for line in ANSWERS.split("\n")[:2]))
    scores = chartqa.score(folder / "p.jsonl", folder / "test_human.json", options={})
    assert scores.metrics == {"relaxed_accuracy": 50, "human": 50}
    assert [example.images[0].name for example in chartqa.examples(folder / "test_human.json", options={})] == [
        "1.png"
    ] * 2


@pytest.mark.parametrize(
    ("text", "right", "split"),
    [
        (
            "question",
            lambda row: row["label"],
            lambda row, is_human: {"type": f"{'human' if is_human else 'augmented'}_test"},
        ),
        ("query", lambda row: [row["label"]], lambda row, is_human: {"human_or_machine": 0 if is_human else 1}),
    ],
)
def test_tables_of_hugging_face(tmp_path, answers, text, right, split):
    rows = [
        {text: row["query"], "answer" if text == "question" else "label": right(row), **split(row, row in HUMAN)}
        | {"image": {"bytes": b"PNG", "path": None}}
        for row in HUMAN + AUGMENTED
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    scores = chartqa.score(answers, tmp_path / "test.parquet", options={})
    assert (scores.metrics["human"], scores.metrics["augmented"]) == (50, 100)
    assert chartqa.examples(tmp_path / "test.parquet", options={})[0].images == (b"PNG",)
