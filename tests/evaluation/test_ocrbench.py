"""OCRBench by its own script's rule, and its files."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation import ocrbench
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.short_answers import SHORT_ANSWER

FORMULAS = ocrbench.FORMULAS
# Data set, category, answers, prediction, and what OCRBench/example.py (commit 794c36d) made of it when it was run.
MEASURED = [
    ("IIIT5K", "Regular Text Recognition", "CENTRE", "The word is centre.", 1),
    ("IIIT5K", "Regular Text Recognition", "FRIEND", "friends?", 1),
    ("IAM", "Handwriting Recognition", "a move", "a\nMOVE to", 1),
    ("docVQA", "Doc-oriented VQA", ["1 000", "1000"], "It is 1000", 1),
    ("docVQA", "Doc-oriented VQA", ["1 000"], "1000", 0),
    ("HME100k", FORMULAS, ["y _ { 2 } = - 1\n", "y_2 = - 1\n"], "$y_{2}=-1$", 1),
    ("HME100k", FORMULAS, ["Y = 1"], "y = 1", 0),
    ("FUNSD", "Key Information Extraction", "12/10/98", None, 0),
]
ROWS = [
    {"dataset_name": name, "id": 7, "type": kind, "answers": answers, "question": f"what {index}?"}
    | {"image_path": f"{name}/{index}.png"}
    for index, (name, kind, answers, *_) in enumerate(MEASURED)
]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def results(write):
    """As the official script writes them: without an answer there is no `predict`."""
    rows = [row | ({"predict": said} if said else {}) for row, (*_, said, _) in zip(ROWS, MEASURED, strict=True)]
    return write("results.json", rows)


def test_scores_are_those_of_the_official_script(write, results):
    references = write("OCRBench.json", ROWS)
    ours = [{"id": index, "answer": said} for index, (*_, said, _) in enumerate(MEASURED) if said]
    for predictions in (results, write("p.json", ours)):
        scores = ocrbench.score(predictions, references, options={})
        assert [sample.score for sample in scores.samples] == [right for *_, right in MEASURED]
        assert scores.metrics == {"final_score": 5, "accuracy": 62.5}
        assert (scores.correct, scores.size, scores.counts["missing"]) == (5, 8, 1)
        assert {name: (group.score, group.num_samples) for name, group in scores.groups["task"].items()} == {
            "Doc-oriented VQA": (1, 2),
            FORMULAS: (1, 2),
            "Key Information Extraction": (0, 1),
            "Text Recognition": (3, 3),
        }
        assert scores.groups["category"]["Regular Text Recognition"].score == 2
        assert scores.groups["dataset"]["IAM"].score == 1
        assert "OCRBench has 1000 questions; these are 8, and so many can be right" in scores.notes
        low, high = scores.intervals()["final_score"]
        assert 0 <= low < 5 < high <= 8


def test_results_of_other_questions(write, results):
    with pytest.raises(EvaluationError, match="8 rows of the official script, which are not the 7 questions"):
        ocrbench.score(results, write("OCRBench.json", ROWS[1:]), options={})
    with pytest.raises(EvaluationError, match="8 of 8 samples have no prediction"):
        ocrbench.score(write("none.json", ROWS), write("OCRBench.json", ROWS), options={})


def test_examples(write, tmp_path):
    for row in ROWS:
        write(f"OCRBench_Images/{row['image_path']}", "x")
    found = ocrbench.examples(write("OCRBench.json", ROWS), options={})
    assert [example.id for example in found] == [str(index) for index in range(8)]
    assert found[0].images == (tmp_path / "OCRBench_Images" / "IIIT5K" / "0.png",)
    assert (found[0].prompt, found[0].references) == ("what 0?" + SHORT_ANSWER, ("CENTRE",))


def test_the_table_of_hugging_face(results, tmp_path):
    rows = [
        {
            "dataset": row["dataset_name"],
            "question": row["question"],
            "question_type": row["type"],
            "answer": row["answers"] if isinstance(row["answers"], list) else [row["answers"]],
            "image": {"bytes": b"PNG", "path": None},
        }
        for row in ROWS
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    assert ocrbench.score(results, tmp_path / "test.parquet", options={}).score == 5
    assert ocrbench.examples(tmp_path / "test.parquet", options={})[7].images == (b"PNG",)


def test_formulas_are_known_by_their_category_too():
    """VLMEvalKit's table has no data sets."""
    question = next(
        ocrbench.read_questions(iter([("", {"category": FORMULAS, "answer": "a b", "index": 1})]), ocrbench._KINDS)
    )
    assert ocrbench.is_right("xabx", question)
