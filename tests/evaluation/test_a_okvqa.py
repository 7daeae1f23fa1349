"""A-OKVQA against the scores of its own script, in every form that predictions come in."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation import a_okvqa
from mmcore.evaluation.a_okvqa import as_choice, examples, score, submission
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.task import read_options

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden beside the project")

ITEMS = [
    {
        "split": "val",
        "image_id": 7,
        "question_id": name,
        "question": "What is it?",
        "choices": ["cat", "Dog", "a. b"],
        "correct_choice_idx": right,
        "direct_answers": ["cat"] * 2 + ["kitten"] * 8,
        "difficult_direct_answer": difficult,
    }
    for name, right, difficult in (("x", 0, False), ("y", 1, False), ("z", 0, True))
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "val.json").write_text(json.dumps(ITEMS))

    def run(predictions, *given, **more):
        path = tmp_path / "p.json"
        path.write_text(predictions if isinstance(predictions, str) else json.dumps(predictions))
        return score(path, tmp_path / "val.json", options=read_options("a-okvqa", given), **more)

    return run


@needs_golden
@pytest.mark.parametrize("who", ["model_answer", "gold_choice"])
def test_scores_of_the_official_script(tmp_path, who):
    """allenai/aokvqa eval_predictions.py: MC 0 and DA 4.761904761904762; MC 100 and DA 66.66666666666667."""
    folder = GOLDEN / "aokvqa_items"
    published = json.loads((folder / "expected.json").read_text())[who]
    predictions = json.loads((folder / "predictions.json").read_text())[who]
    references = folder / "aokvqa_v1p0_val_8items.json"
    (tmp_path / "p.json").write_text(json.dumps(predictions))
    scores = score(tmp_path / "p.json", references, options=read_options("a-okvqa"))
    assert scores.metrics == {"multiple_choice": published["MC"], "direct_answer": published["DA"]}
    assert scores.score == published["MC"]
    assert (scores.correct, scores.size) == (len(predictions) * published["MC"] / 100, len(predictions))
    assert "1 of 8 questions are difficult" in scores.notes[0]

    one = {name: {"direct_answer": texts["direct_answer"]} for name, texts in predictions.items()}
    (tmp_path / "p.json").write_text(json.dumps(one))
    scores = score(tmp_path / "p.json", references, options=read_options("a-okvqa"))
    assert (scores.metrics, scores.score) == ({"direct_answer": published["DA"]}, published["DA"])
    assert (scores.correct, scores.size) == (None, 7)


@needs_golden
def test_cases_of_a_data_engine_round():
    """Its own cases by kind, whose scores are those of `model_answer` above."""
    path = GOLDEN / "mllm_dataengine" / "bad_case_aokvqa_classified.json"
    references = GOLDEN / "aokvqa_items" / "aokvqa_v1p0_val_8items.json"
    scores = score(path, references, options=read_options("a-okvqa"))
    assert scores.metrics == {"multiple_choice": 0, "direct_answer": 4.761904761904762}


def test_texts_are_compared_as_they_are(run):
    both = {"multiple_choice": "cat", "direct_answer": "kitten"}
    scores = run({"x": both, "y": {**both, "multiple_choice": "dog"}, "z": {"multiple_choice": "A"}})
    assert scores.metrics == {"multiple_choice": pytest.approx(100 / 3), "direct_answer": 100}
    assert scores.counts["unparsed"] == 2  # "dog" is not "Dog", and in the official form "A" is a text
    assert [sample.parsed for sample in scores.samples] == ["cat", "", ""]
    assert run({"x": {"direct_answer": "cat"}, "y": {"direct_answer": "Cat"}}).score == pytest.approx(100 / 3)


def test_what_is_missing_counts_nothing(run):
    scores = run({"x": {"multiple_choice": "cat"}})
    assert (scores.metrics, scores.counts["missing"]) == ({"multiple_choice": pytest.approx(100 / 3)}, 2)
    scores = run({"x": {"multiple_choice": None, "direct_answer": "kitten"}, "z": {"direct_answer": "kitten"}})
    assert (scores.metrics, scores.counts["missing"], scores.size) == ({"direct_answer": 50}, 1, 2)


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ({"x": "cat", "y": "kitten"}, ("cat", "kitten")),
        ('{"id": "x", "prompt": "?", "answer": "A"}\n{"id": "y", "answer": "B. Dog"}\n', ("cat", "Dog")),
        ('{"question_id": "x", "text": "The answer is C."}\n{"question_id": "y", "text": "C"}\n', ("a. b", "a. b")),
        ([{"idx": "x", "model_answer": "Cat. It is"}, {"idx": "y", "model_answer": "Dog"}], ("cat", "dog")),
        ([{"question_id": "x", "multiple_choice": "cat"}, {"question_id": "y", "multiple_choice": "A"}], ("cat", "A")),
        ({"some": [{"idx": "x", "model_answer": "cat"}], "more": [{"idx": "y", "model_answer": "A"}]}, ("cat", "a")),
    ],
)
def test_every_form_of_predictions(run, predictions, expected):
    scores = run(predictions)
    assert scores.metrics["multiple_choice"] == pytest.approx(
        100 * ((expected[0] == "cat") + (expected[1] == "Dog")) / 3
    )
    texts = [text if text in ITEMS[0]["choices"] else "" for text in expected]
    assert [sample.parsed for sample in scores.samples] == [*texts, ""]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("cat", "cat"),
        ("B", "Dog"),
        ("B. no", "Dog"),
        ("(C) a. b", "a. b"),
        ("(C) no", "(C) no"),
        ("D", "D"),
        ("b", "b"),
    ],
)
def test_the_choice_an_answer_stands_for(answer, expected):
    assert as_choice(answer, ["cat", "Dog", "a. b"]) == expected
    assert as_choice("B", ["x", "B", "A"]) == "B"  # a choice is itself before it is a letter


def test_data_engines_reading_of_answers_by_loss(run):
    """Up to the first full stop, in lower case, for both: choices with either of them are lost, as they are there."""
    answers = {"x": "(A) cat", "y": "(B) Dog", "z": "(A) cat"}
    assert run(answers, "prompt=data-engine").metrics["multiple_choice"] == 100
    scores = run(answers, "prompt=data-engine", "reading=data-engine")
    assert scores.metrics == {"multiple_choice": pytest.approx(200 / 3), "direct_answer": pytest.approx(100 / 3)}
    assert scores.scorer["reading"] == "data-engine"


def test_short_answers_are_direct_answers_alone(run):
    """Nobody asked for a letter, so A is a word."""
    scores = run({"x": "kitten", "y": "A", "z": "A"}, "prompt=short")
    assert (scores.metrics, scores.correct, scores.size) == ({"direct_answer": 50}, None, 2)


def test_strict_as_in_the_official_function(run):
    whole = {name: {"multiple_choice": "cat", "direct_answer": "cat"} for name in "xyz"}
    assert run(whole, "strict=yes").metrics["multiple_choice"] == pytest.approx(200 / 3)
    with pytest.raises(EvaluationError, match=r"1 of 3 samples have no prediction \(y\)"):
        run({"x": whole["x"], "z": whole["z"]}, "strict=yes")
    with pytest.raises(EvaluationError, match=r"1 of 3 predictions are none of their .* of y, 'dog'"):
        run({**whole, "y": {"multiple_choice": "dog"}}, "strict=yes")


@pytest.mark.parametrize(
    ("predictions", "error", "message"),
    [
        ({"x": {"multiple_choice": "cat"}, "w": {"multiple_choice": "cat"}}, EvaluationError, r"do not have \(w\)"),
        ({"x": {"direct_answer": "cat"}, "w": {"direct_answer": "cat"}}, EvaluationError, r"do not have \(w\)"),
        ({"w": "cat"}, EvaluationError, "3 of 3 samples have no prediction"),
        ({}, EvaluationError, "3 of 3 samples have no prediction"),
        ({"z": {"direct_answer": "cat"}}, EvaluationError, "too difficult"),
        ('{"id": "x", "answer": "a"}\n{"id": "x", "answer": "b"}', EvaluationError, r"different predictions \(x\)"),
        ([{"image_id": 3, "text": "a"}], ValueError, "a prediction of A-OKVQA is an id with"),
        ([3], ValueError, "it is 3"),
        ({"x": {"answer": "a"}}, ValueError, "the answer to x is a text, not {'answer': 'a'}"),
        ({"x": {"multiple_choice": 1}}, ValueError, "the answer to x is a text"),
        ('{"id": "x", "answer": 3}', ValueError, "the answer to x is a text, not 3"),
    ],
)
def test_predictions_of_something_else(run, predictions, error, message):
    with pytest.raises(error, match=message):
        run(predictions)


def test_repeated_and_empty_ones_are_counted(run):
    rows = [("x", "cat"), ("y", " "), ("z", "cat"), ("x", "cat")]
    scores = run("".join(json.dumps({"id": name, "answer": answer}) + "\n" for name, answer in rows))
    assert scores.counts == {"empty": 1, "missing": 0, "repeated": 1, "unparsed": 0}


def test_some_of_the_examples_alone(run):
    assert run({"x": "cat"}, only=["x"]).metrics == {"multiple_choice": 100, "direct_answer": pytest.approx(200 / 3)}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"id": 1}], "row 0 is no question of A-OKVQA .* it has id"),
        ([ITEMS[0], ITEMS[0]], "question x is there twice"),
        ([], "holds no questions"),
        (
            [{key: ITEMS[0][key] for key in ("question_id", "question", "choices", "image_id")}],
            "not public: --submission",
        ),
    ],
)
def test_references_that_are_something_else(tmp_path, items, message):
    (tmp_path / "val.json").write_text(json.dumps(items))
    (tmp_path / "p.json").write_text('{"x": "cat"}')
    with pytest.raises(ValueError, match=message):
        score(tmp_path / "p.json", tmp_path / "val.json", options=read_options("a-okvqa"))


@pytest.mark.parametrize("folder", ["images/val2017", "val2017"])
def test_examples_with_cocos_pictures(tmp_path, folder):
    picture = tmp_path / folder / "000000000007.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"")
    (tmp_path / "val.json").write_text(json.dumps(ITEMS))
    for images in (None, picture.parent, picture.parent.parent):
        first, *_ = examples(tmp_path / "val.json", images, options=read_options("a-okvqa"))
        assert first.images == (picture,)
    assert first.prompt == (
        "What is it?\nA. cat\nB. Dog\nC. a. b\nAnswer with the option's letter from the given choices directly."
    )
    assert (first.choices, first.references) == (("cat", "Dog", "a. b"), ("cat", "kitten"))
    short, *_ = examples(tmp_path / "val.json", options=read_options("a-okvqa", ["prompt=short"]))
    assert short.prompt == "What is it?\nAnswer the question using a single word or phrase."
    engine, *_ = examples(tmp_path / "val.json", options=read_options("a-okvqa", ["prompt=data-engine"]))
    assert engine.prompt == "What is it?\n(A) cat (B) Dog (C) a. b"
    assert engine.choices == ("(A) cat", "(B) Dog", "(C) a. b")


def test_parquet_files_hold_pictures_and_answers_as_text(tmp_path):
    rows = [
        {**item, "direct_answers": str(item["direct_answers"]), "image": {"bytes": b"\x89", "path": None}}
        for item in ITEMS
    ]
    rows = [{key: value for key, value in row.items() if key not in ("image_id", "split")} for row in rows]
    path = tmp_path / "validation-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for data in (path, tmp_path):
        first, *_ = examples(data, options=read_options("a-okvqa"))
        assert (first.images, first.references) == ((b"\x89",), ("cat", "kitten"))
    (tmp_path / "p.json").write_text(json.dumps({"x": "kitten", "y": "cat"}))
    assert score(tmp_path / "p.json", path, options=read_options("a-okvqa")).metrics["direct_answer"] == pytest.approx(
        250 / 3
    )


def test_what_the_leaderboard_takes(tmp_path):
    asked = [{key: item[key] for key in ("question_id", "question", "choices", "image_id")} for item in ITEMS]
    (tmp_path / "test.json").write_text(json.dumps(asked))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"id": name, "answer": "B"}) + "\n" for name in "xyz"))
    arguments = tmp_path / "p.jsonl", tmp_path / "test.json", tmp_path / "out.json", read_options("a-okvqa")
    submission(*arguments)
    both = {"multiple_choice": "Dog", "direct_answer": "Dog"}
    assert json.loads((tmp_path / "out.json").read_text()) == dict.fromkeys("xyz", both)
    (tmp_path / "p.jsonl").write_text('{"id": "x", "answer": "B"}')
    with pytest.raises(EvaluationError, match="2 of 3 samples have no prediction"):
        submission(*arguments)


def test_metrics_and_scales():
    assert list(a_okvqa.SCALES) == ["multiple_choice", "direct_answer"]
