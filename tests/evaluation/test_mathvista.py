"""MathVista: the official query, extraction without a language model, normalisation, every form of file."""

import json

import pytest

from mmcore.evaluation import mathvista
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.task import read_options

METADATA = {
    "split": "testmini",
    "language": "english",
    "source": "SciBench",
    "category": "math-targeted-vqa",
    "task": "textbook question answering",
    "context": "scientific figure",
    "grade": "college",
    "skills": ["scientific reasoning"],
}
OFFICIAL = read_options("mathvista")


def problem(pid, answer, answer_type="text", choices=None, precision=None, unit=None, **metadata):
    return {
        "pid": pid,
        "question": f"Question {pid}?",
        "image": f"images/{pid}.jpg",
        "choices": choices,
        "unit": unit,
        "precision": precision,
        "answer": answer,
        "question_type": "multi_choice" if choices else "free_form",
        "answer_type": answer_type,
        "metadata": {**METADATA, **metadata},
    }


PROBLEMS = {
    "1": problem("1", "1.2", "float", precision=1.0, unit="m"),
    "2": problem("2", "145°", choices=["135°", "140°", "145°", "150°"], skills=["geometry reasoning", "arithmetic"]),
    "3": problem("3", "4", "integer", task="math word problem"),
    "4": problem("4", "[2, 8]", "list"),
    "5": problem("5", "Yes", choices=["Yes", "No"], task="figure question answering"),
}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "testmini.json"
    path.write_text(json.dumps(PROBLEMS), encoding="utf-8")
    return path


@pytest.fixture
def score(tmp_path, data):
    def score(answers, **options):
        path = tmp_path / "predictions.json"
        path.write_text(json.dumps(answers), encoding="utf-8")
        return mathvista.score(path, data, options={**OFFICIAL, **options})

    return score


def one(answer_type="text"):
    kind = "multi_choice" if answer_type == "text" else "free_form"
    row = {"pid": "1", "question": "?", "choices": ["apple pie", "B", "pear"], "precision": 2, "question_type": kind}
    return mathvista._problem({**row, "answer_type": answer_type, "answer": "x"}, "here")


def test_the_query_is_the_official_one(data):
    """As data/query.json of the official repository has them; there all 1000 are equal."""
    hint, question, *rest = mathvista.load_problems(data)[1].query.split("\n")
    assert hint == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    )
    assert question == "Question: Question 2?"
    assert rest == ["Choices:", "(A) 135°", "(B) 140°", "(C) 145°", "(D) 150°"]
    queries = [found.query.split("\n")[0] for found in mathvista.load_problems(data)]
    assert queries[0].endswith(
        "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at "
        "the end."
    )
    assert queries[2].endswith("requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.")
    assert queries[3].endswith(
        "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end."
    )
    assert mathvista.load_problems(data)[0].query.endswith("\nQuestion: Question 1? (Unit: m)")


@pytest.mark.parametrize(
    ("extraction", "answer_type", "read"),
    [
        ("A", "text", "apple pie"),
        ("B", "text", "B"),
        ("(c) pear", "text", "pear"),
        ("x (A) (C)", "text", "apple pie"),  # the first in brackets
        ("a", "text", "B"),  # no capital letter: the nearest choice, the first of equals
        ("(Z)", "text", "B"),
        ("pears", "text", "pear"),
        ("apple", "text", "apple pie"),
        ("", "text", "B"),  # the shortest choice
        ("2.0", "integer", "2"),
        ("-0.5", "integer", "0"),
        ("two", "integer", None),
        ("inf", "integer", None),
        ("1,000", "integer", None),
        ("2.675", "float", "2.67"),  # as floats round
        ("3", "float", "3.0"),
        ("", "float", None),
        (" [1, 2]", "list", " [1, 2]"),
    ],
)
def test_normalisation(extraction, answer_type, read):
    assert mathvista.normalise(extraction, one(answer_type)) == read


@pytest.mark.parametrize(
    ("response", "answer_type", "extraction"),
    [
        ("", "text", ""),
        ("pear", "text", "pear"),
        ("Pear", "text", None),
        ("A", "text", None),  # officially a letter alone goes to the language model
        (" 7\n", "integer", "7"),
        ("7.0", "integer", None),
        ("7", "float", "7.0"),
        ("1e3", "float", "1000.0"),
        ("[1, 2]", "list", None),
    ],
)
def test_what_needs_no_language_model(response, answer_type, extraction):
    assert mathvista.quick_extract(one(answer_type), response) == extraction


@pytest.mark.parametrize(
    ("response", "answer_type", "read"),
    [
        ('The answer is "pear".', "text", "pear"),  # officially with --quick_extract
        ("A", "text", "A"),
        ("(B)", "text", "B"),
        ("C.", "text", "C"),
        ("C. pear, of course", "text", "C"),
        ("(A) is wrong and (C) too. The correct answer is (B) B", "text", "B"),
        ("Between (C) and (A)", "text", "C"),
        ("**Answer:** C", "text", "C"),
        ("It is an APPLE PIE.", "text", "apple pie"),
        ("No apple pie but a pear", "text", "pear"),
        ("A pearl", "text", ""),  # an article, and another word
        ("nothing", "text", ""),
        ("The number missing in the sequence is 14.", "integer", "14"),
        ("3 + 4 = 7, so the answer is 7 of 10.", "integer", "7"),
        ("It costs $1,234.50", "float", "1234.50"),
        ("no number", "integer", ""),
        ("between [1, 2] and [2007, 2008].", "list", "[2007, 2008]"),
        ("2007 and 2008", "list", ""),
    ],
)
def test_rules_that_stand_in_for_it(response, answer_type, read):
    assert mathvista.read_answer(one(answer_type), response) == read


def test_scores_groups_and_counts(score):
    answers = {"1": "About 1.24 m", "2": "145°", "3": "4", "4": "", "5": "I cannot tell"}
    scores = score(answers)
    assert (scores.score, scores.correct, scores.size) == (60.0, 3, 5)
    assert [sample.parsed for sample in scores.samples] == ["1.2", "145°", "4", "", "No"]
    counts = {name: scores.counts[name] for name in ("empty", "extracted", "fallback", "unparsed")}
    assert counts == {"empty": 1, "extracted": 0, "fallback": 1, "unparsed": 1}
    assert any("GPT-4 read the answer out of 2 of 5" in note for note in scores.notes)
    assert scores.groups["skills"]["geometry reasoning"] == mathvista.Group(score=100.0, num_samples=1)
    assert scores.groups["skills"]["scientific reasoning"].num_samples == 4
    assert scores.groups["task"]["math word problem"].score == 100.0
    assert list(scores.groups) == list(mathvista.KINDS)
    low, high = scores.intervals()["accuracy"]
    assert low < 60 < high


def test_options(score):
    answers = {"1": "About 1.24 m", "2": "I cannot tell", "3": "four", "4": "[2, 8]", "5": "?"}
    shortest = score({**answers, "5": "?"})
    assert [sample.score for sample in shortest.samples] == [1, 0, 0, 1, 0]
    assert [sample.parsed for sample in shortest.samples] == ["1.2", "135°", "", "[2, 8]", "No"]
    unread = score(answers, extraction="none", empty="wrong")
    assert [sample.parsed for sample in unread.samples] == [""] * 5
    assert unread.counts["unparsed"] == 5 and "they count as empty" in unread.notes[-1]


def test_an_official_answer_file_brings_its_extractions(score):
    """What GPT-4 extracted counts; where it is empty or not there, the rules read the response."""
    answers = {"1": "no idea", "2": "It is the third one", "3": "3 or 4", "4": "[2, 8]", "5": "(A) Yes"}
    rows = {name: {**PROBLEMS[name], "response": text} for name, text in answers.items()}
    rows["1"]["extraction"], rows["2"]["extraction"], rows["3"]["extraction"] = "1.16", "C", " "
    scores = score(rows)
    assert [sample.parsed for sample in scores.samples] == ["1.2", "145°", "4", "[2, 8]", "Yes"]
    assert (scores.score, scores.counts["extracted"], scores.counts["fallback"]) == (100.0, 2, 3)
    with pytest.raises(EvaluationError, match=r"1 of 5 samples have no prediction \(1\)"):
        score({**rows, "1": {**PROBLEMS["1"], "error": "timeout"}})


def test_rows_of_every_form(tmp_path, data):
    answers = {"1": "1.2", "2": "145°", "3": "4", "4": "[2, 8]", "5": "Yes"}
    for keys in (("id", "answer"), ("question_id", "text"), ("pid", "response")):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(dict(zip(keys, pair, strict=True))) + "\n" for pair in answers.items()))
        assert mathvista.score(path, data, options=OFFICIAL).score == 100.0


def test_parquet_holds_the_pictures(tmp_path, data):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "data"
    folder.mkdir()
    for number, names in enumerate((["1", "2"], ["3", "4", "5"])):
        rows = [{**PROBLEMS[name], "decoded_image": {"bytes": name.encode(), "path": None}} for name in names]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"testmini-0000{number}-of-00002.parquet")
    found = mathvista.examples(folder, options=OFFICIAL)
    assert [example.images for example in found] == [(name.encode(),) for name in PROBLEMS]
    assert [one.query for one in mathvista.load_problems(folder)] == [
        one.query for one in mathvista.load_problems(data)
    ]
    assert found[1].choices == ("135°", "140°", "145°", "150°") and found[1].references == ("145°",)


def test_examples_find_their_pictures(tmp_path, data):
    (tmp_path / "images").mkdir()
    for name in PROBLEMS:
        (tmp_path / "images" / f"{name}.jpg").write_bytes(b"")
    found = mathvista.examples(data, options=OFFICIAL)
    assert [example.images for example in found] == [(tmp_path / "images" / f"{name}.jpg",) for name in PROBLEMS]


def test_answers_that_are_not_public(tmp_path, data):
    hidden = {name: {**row, "answer": ""} for name, row in PROBLEMS.items()}
    data.write_text(json.dumps(hidden))
    path, output = tmp_path / "p.json", tmp_path / "out" / "output.json"
    path.write_text(json.dumps({"1": "1.24", "2": "(C)", "3": "x", "4": "", "5": "Yes"}))
    with pytest.raises(ValueError, match=r"5 of 5 problems have no answer to compare with, first 1"):
        mathvista.score(path, data, options=OFFICIAL)
    mathvista.submission(path, data, output, OFFICIAL)
    written = json.loads(output.read_text())
    assert list(written) == list(PROBLEMS)
    assert (written["2"]["response"], written["2"]["extraction"]) == ("(C)", "C")
    assert written["1"].keys() == {*PROBLEMS["1"], "query", "response", "extraction"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"1": {**PROBLEMS["1"], "answer_type": "text"}, "2": 3}, r"problem 2 is no problem of MathVista"),
        ({"1": {**PROBLEMS["1"], "answer_type": "date"}}, r"problem 1 is no problem of MathVista \(KeyError\('date'\)"),
        ([PROBLEMS["1"], PROBLEMS["1"]], r"holds a problem twice"),
        ([], r"holds no problems"),
    ],
)
def test_files_that_are_none_of_its(data, content, message):
    data.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        mathvista.load_problems(data)
