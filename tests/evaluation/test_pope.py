"""POPE: the rule for yes and no, the five numbers and their means, and files with and without ids."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation.pope import category_of, examples, load_questions, read_answer, says_neither, score
from mmcore.evaluation.scores import EvaluationError

LABELS = {"adversarial": "yes no yes no", "popular": "yes no", "random": "yes no yes"}


def official(labels):
    """Lines of coco_pope_*.json; their numbers begin at 1 in each."""
    rows = [
        {"question_id": number, "image": "a.jpg", "text": f"Is there a thing{number} in the image?", "label": label}
        for number, label in enumerate(labels.split(), 1)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "coco"
    folder.mkdir()
    for category, labels in LABELS.items():
        (folder / f"coco_pope_{category}.json").write_text(official(labels))
    return folder


@pytest.mark.parametrize(
    ("answer", "parsed", "neither"),
    [
        ("Yes", "yes", False),
        ("no", "no", False),
        ("No, there is none.", "no", False),
        ("NO", "yes", True),  # only "No" and "no" are no
        ("There is not. Yes", "no", False),
        ("Yes. There is no dog", "yes", False),
        ("There isn't", "yes", True),
        ("nothing", "yes", True),
        ("no\nthing", "yes", True),  # words are between spaces
        (".No", "yes", True),
        ("", "yes", True),
        ("No,no", "yes", True),  # commas go before words are cut
    ],
)
def test_the_official_rule(answer, parsed, neither):
    assert (read_answer(answer), says_neither(answer)) == (parsed, neither)


def test_the_five_numbers_of_a_category(folder, tmp_path):
    """True and false positives 2, 1, true and false negatives 1, 0."""
    path = tmp_path / "answers.jsonl"
    path.write_text(lines({"question": "is there?", "answer": answer} for answer in ("yes", "Yes", "yes", "No")))
    with pytest.raises(
        EvaluationError, match="answers 'is there\\?', but the question in that place is 'Is there a thing1"
    ):
        score(path, folder / "coco_pope_adversarial.json", options={})
    path.write_text(lines({"answer": answer} for answer in ("yes", "Yes", "yes", "No")))
    scores = score(path, folder / "coco_pope_adversarial.json", options={})
    expected = {"f1": 80, "accuracy": 75, "precision": 200 / 3, "recall": 100, "yes_ratio": 75}
    assert scores.metrics == pytest.approx(expected)
    assert (scores.score, scores.correct, scores.size) == (scores.metrics["f1"], 3, 4)
    assert scores.groups["category"]["adversarial"].num_samples == 4
    low, high = scores.intervals()["f1"]
    assert 0 <= low < 80 < high <= 100


def test_means_of_the_categories_as_llava_reports_them(folder, tmp_path):
    """LLaVA's ids are those of the category's file, raised by 10,000,000 for random and 20,000,000 for popular."""
    answers = {1: "Yes", 2: "Yes", 3: "Yes", 4: "No", 10000001: "Yes", 10000002: "No", 10000003: "Yes"}
    answers |= {20000001: "No", 20000002: "Yes"}
    path = tmp_path / "llava.jsonl"
    path.write_text(lines({"question_id": name, "text": text, "prompt": "?"} for name, text in answers.items()))
    scores = score(path, folder, options={})
    groups = {kind: {name: group.score for name, group in row.items()} for kind, row in scores.groups.items()}
    assert groups["category"] == pytest.approx({"adversarial": 80, "popular": 0, "random": 100})
    assert groups["category, accuracy"] == pytest.approx({"adversarial": 75, "popular": 0, "random": 100})
    assert groups["category, yes_ratio"] == pytest.approx({"adversarial": 75, "popular": 50, "random": 200 / 3})
    assert scores.metrics == pytest.approx(
        {"f1": 60, "accuracy": 175 / 3, "precision": 500 / 9, "recall": 200 / 3, "yes_ratio": 575 / 9}
    )
    assert [sample.id for sample in scores.samples][:5] == [*(f"adversarial/{n}" for n in range(1, 5)), "popular/1"]
    ours = tmp_path / "ours.jsonl"
    ours.write_text(lines({"id": sample.id, "answer": sample.answer} for sample in scores.samples))
    assert score(ours, folder, options={}).metrics == scores.metrics
    ours.write_text(json.dumps({sample.id: sample.answer for sample in scores.samples}))
    assert score(ours, folder, options={}).metrics == scores.metrics


def test_answers_in_a_file_a_category(folder, tmp_path):
    answers = tmp_path / "answers"
    answers.mkdir()
    for category, labels in LABELS.items():
        rows = [{"question_id": n, "answer": label} for n, label in enumerate(labels.split(), 1)]
        if category == "random":
            rows = [{"answer": row["answer"]} for row in rows]
        (answers / f"mine_{category}.json").write_text(lines(rows))
    assert score(answers, folder, options={}).metrics["accuracy"] == 100
    assert score(answers / "mine_popular.json", folder / "coco_pope_popular.json", options={}).score == 100
    (answers / "mine_popular.json").unlink()
    with pytest.raises(EvaluationError, match=r"2 of 9 samples have no prediction \(popular/1, popular/2\)"):
        score(answers, folder, options={})


def test_what_divides_by_zero_is_zero(folder, tmp_path):
    (tmp_path / "p.json").write_text(lines({"answer": "no"} for _ in range(2)))
    scores = score(tmp_path / "p.json", folder / "coco_pope_popular.json", options={})
    assert scores.metrics == {"f1": 0, "accuracy": 50, "precision": 0, "recall": 0, "yes_ratio": 0}
    assert scores.intervals()["f1"] == (0, 0)


def test_tables_of_lmms_lab_and_of_vlmevalkit(tmp_path):
    rows = [
        {"question_id": "1", "question": "Is there?", "answer": label, "category": name, "image": {"bytes": b"x"}}
        for name, label in (("adversarial", "yes"), ("popular", "no"))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    first, second = examples(tmp_path, options={})
    assert (first.id, second.id, second.references) == ("adversarial/1", "popular/1", ("no",))
    assert first.images == (b"x",)
    assert first.prompt == "Is there?\nAnswer the question using a single word or phrase."

    path = tmp_path / "POPE.tsv"
    path.write_text(
        "index\tquestion\tanswer\tcategory\n0\ta\tYes\trandom,popular\n1\tb\tNo\trandom\n2\tc\tNo\tpopular\n"
    )
    (tmp_path / "p.tsv").write_text("index\tanswer\tprediction\n0\tYes\tYes\n1\tNo\tNo\n2\tNo\tYes\n")
    scores = score(tmp_path / "p.tsv", path, options={})
    sizes = {name: (group.score, group.num_samples) for name, group in scores.groups["category, accuracy"].items()}
    assert sizes == {"random": (100, 2), "popular": (50, 2)}
    assert scores.metrics["accuracy"] == 75


def test_examples_find_their_pictures(folder):
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").write_bytes(b"")
    found = examples(folder, options={})
    assert len(found) == 9
    assert found[4].images == (folder / "images" / "a.jpg",)
    assert (found[4].id, found[4].references, found[4].choices) == ("popular/1", ("yes",), ("Yes", "No"))
    one = examples(folder / "coco_pope_popular.json", options={})
    assert [example.id for example in one] == ["1", "2"]


def test_some_of_the_examples_alone(folder, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"popular/1": "Yes"}))
    scores = score(tmp_path / "p.json", folder, options={}, only=["popular/1"])
    assert (scores.score, scores.size, list(scores.groups["category"])) == (100, 1, ["popular"])


def test_categories_of_file_names(tmp_path):
    names = ("coco_pope_random.json", "aokvqa_pope_seem_popular.json", "questions.json")
    assert [category_of(tmp_path / name) for name in names] == ["random", "popular", ""]
    (tmp_path / "questions.json").write_text(official("yes no"))
    (tmp_path / "p.json").write_text(json.dumps({"1": "Yes", "2": "No"}))
    scores = score(tmp_path / "p.json", tmp_path / "questions.json", options={})
    assert (scores.score, scores.groups) == (100, {})


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (lines([{"answer": "yes"}] * 3), EvaluationError, "has 3 answers without ids, .* the references have 2"),
        (official("yes no"), ValueError, "an answer to POPE has answer, .* it has image, label"),
        (lines([{"question_id": 1, "answer": 1}]), ValueError, "an answer is a text, not 1"),
        (lines([{"question_id": 10000001, "text": "No"}]), EvaluationError, r"do not have \(10000001\)"),
        (
            lines([{"id": 1, "answer": "No"}, {"id": 1, "answer": "Yes"}]),
            EvaluationError,
            r"different predictions \(1\)",
        ),
        ("[3]", ValueError, "it is 3"),
    ],
)
def test_answers_to_something_else(folder, tmp_path, content, error, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(error, match=message):
        score(tmp_path / "p.json", folder / "coco_pope_popular.json", options={})


def test_answers_without_ids_to_several_categories(folder, tmp_path):
    (tmp_path / "p.json").write_text(lines([{"answer": "yes"}] * 9))
    with pytest.raises(EvaluationError, match="the references have several categories"):
        score(tmp_path / "p.json", folder, options={})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "text": "a"}', "no question of POPE .* it has question_id, text"),
        ('{"question_id": 1, "text": "a", "label": "maybe"}', "right is yes or no, not 'maybe'"),
        (lines([{"question_id": 1, "text": "a", "label": "yes"}] * 2), "question random/1 twice"),
        ("[]", "has no questions"),
    ],
)
def test_references_that_are_something_else(tmp_path, content, message):
    path = tmp_path / "coco_pope_random.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_questions(path)
