"""MMMU: published and official scores to the digit, the parsing rules, the forms of its files, wrong inputs."""

import json
import random
from pathlib import Path

import pytest

from mmcore.evaluation import mmmu
from mmcore.evaluation.metrics.mmmu import is_right, parse_choice, parse_choice_like_megatron, parse_open
from mmcore.evaluation.mmmu_files import DOMAIN_OF, load_questions
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.task import load_task, read_options

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden" / "mmmu_val"
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason="no ../shared/golden beside the project")
LLAVA = FOLDER / "llava1.5_13b"
ANSWERS = FOLDER / "answer_dict_val.json"
CHOICES = {"A": "cat", "B": "dog", "C": "red cat"}


def options(**given: str) -> dict[str, str]:
    return read_options("mmmu", [f"{name}={value}" for name, value in given.items()])


def expected(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


@needs_golden
def test_llava_has_the_official_score_in_every_part():
    """SOURCE.md of the golden set: 330 of 900, the paper's 36.4 but for what is drawn."""
    right = expected("expected.json")["llava1.5_13b"]
    scores = mmmu.score(LLAVA, ANSWERS, options=options())
    assert (
        (scores.correct, scores.size)
        == (right["overall_seed42"]["correct"], right["overall_seed42"]["n"])
        == (330, 900)
    )
    assert scores.score == pytest.approx(100 * right["overall_seed42"]["acc"], abs=1e-12)
    assert scores.counts["fallback"] == len(right["random_fallback_ids"]) == 2
    for kind, parts in (("domain", right["domains"]), ("subject", right["subjects"])):
        found = {name: (group.score, group.num_samples) for name, group in scores.groups[kind].items()}
        assert found == {name: (100 * part["correct"] / part["n"], part["n"]) for name, part in parts.items()}
    kinds = scores.groups["question_type"]
    assert kinds["open"].num_samples == right["open_n"]
    assert kinds["open"].score * right["open_n"] == pytest.approx(100 * right["open_correct"])


@needs_golden
def test_llava_is_judged_as_officially_question_by_question():
    judged = expected("expected_per_question_llava1.5_13b.json")
    scores = mmmu.score(LLAVA, ANSWERS, options=options())
    assert {sample.id for sample in scores.samples} == set(judged)
    for sample in scores.samples:
        official = judged[sample.id]
        parsed = [official["parsed"]] if isinstance(official["parsed"], str) else sorted(official["parsed"])
        assert (sorted(sample.parsed.split(" | ")), sample.score == 1) == (parsed, official["correct"]), sample.id
    note = next(note for note in scores.notes if "2 of 847" in note)
    assert all(name in note for name, entry in judged.items() if entry["fallback"]) and "1 are right" in note


@needs_golden
@pytest.mark.parametrize(
    ("given", "correct", "fallback", "unparsed"),
    [({"fallback": "none"}, 329, 0, 2), ({"fallback": "first"}, 330, 2, 0), ({"parser": "megatron"}, 330, 0, 0)],
)
def test_ways_without_chance(given, correct, fallback, unparsed):
    """SOURCE.md and expected.json of the golden set."""
    scores = mmmu.score(LLAVA, ANSWERS, options=options(**given))
    assert scores.correct == correct
    assert (scores.counts["fallback"], scores.counts["unparsed"]) == (fallback, unparsed)


@needs_golden
def test_parsed_answers_have_the_same_score():
    scores = mmmu.score(LLAVA / "total_val_output.json", ANSWERS, options=options())
    assert (scores.correct, scores.size, scores.counts["fallback"]) == (330, 900, 0)
    assert "parsed already" in scores.notes[0]


@needs_golden
def test_lines_of_ours_take_their_options_from_the_references(tmp_path):
    rows = [row for file in sorted(LLAVA.glob("*/output.json")) for row in json.loads(file.read_text())]
    lines = tmp_path / "ours.jsonl"
    lines.write_text("".join(json.dumps({"id": row["id"], "answer": row["response"]}) + "\n" for row in rows))
    scores = mmmu.score(lines, LLAVA, options=options())
    assert (scores.correct, scores.counts["fallback"], scores.counts["without_options"]) == (330, 2, 0)

    # Without them, the one answer that is told by its option's text is not.
    scores = mmmu.score(lines, ANSWERS, options=options(fallback="none"))
    assert (scores.correct, scores.counts["unparsed"], scores.counts["without_options"]) == (329 - 1, 3, 847)
    assert "844 of them name a letter" in scores.notes[-1] and "the other 3" in scores.notes[-1]


def test_choices_are_read_as_officially():
    """Each line is a rule of eval_utils.py."""
    for response, letter in {
        "B": "B",
        "B.": "B",
        "(B) dog": "B",
        "A) cat": None,  # only Megatron-LM takes it
        "(A) or rather (C)": "C",
        "(A), B": "A",  # parentheses come first
        "A dog is B here": "B",  # the last one
        "It is a dog": None,  # four words and no letter
        "I think that it is a dog": "B",
        "I think that it is the red cat": "A",  # "cat" stands later than "red cat"
        "none of these is on the picture": None,
        "": None,
        ":'B'": "B",  # marks are stripped in an order, each once
        "':B": None,
        "b": None,
    }.items():
        assert parse_choice(response, CHOICES) == letter, response
    assert parse_choice("it is a dog, said the man", dict.fromkeys(CHOICES)) is None


def test_choices_are_read_as_by_megatron():
    for response, letter in {
        "A) cat": "A",
        "C) or B)": "B",  # of these the first option
        "A) or (B)": "B",
        r"it is (A) so \answer{B}": "B",
        r"\boxed{C} (A)": "C",
        "Answer:B": "B",
        "no": None,
    }.items():
        assert parse_choice_like_megatron(response, CHOICES) == letter, response


def test_open_answers_are_read_as_officially():
    for response, answer, right in (
        ("The answer is 1,234.", "1234", True),
        ("so x = 3.14159", "3.14", True),
        ("3.14", "3.1416", True),  # both are rounded to two digits
        ("it is 12 or 13", "13", True),  # any number in the last words
        ("Paris", "paris", True),
        ("It could be Paris, France", "Paris", True),  # within the text
        ("Paris", "Paris, France", False),
        ("xenon", "x", False),  # a letter alone has to begin or end a word
        ("x and y", "x", True),
        ("the sum is 5\nthus 6", "5", True),  # every line counts
        ("so 2\na = 5", "2", True),
        ("a = 5\nso 7", "5", False),  # "=" counts in the last one alone
        ("1.5e3", "1500", True),
        ("", "0", False),
    ):
        assert is_right(parse_open(response), [answer]) == right, response
    assert parse_open("The answer is: 7.") == ["is: 7", 7.0]
    assert parse_open("it is A.") == [" a", "a "]
    assert is_right(parse_open("3.429"), ["24/7", "3.429"])


def row(name, response, answer="A", **more):
    choices = {
        "question_type": "multiple-choice",
        "all_choices": [*"ABCD"],
        "index2ans": dict.fromkeys("ABCD", "x y z"),
    }
    return {"id": name, "answer": answer, "response": response, **choices, **more}


@pytest.fixture
def outputs(tmp_path):
    """A folder of outputs most of whose answers name nothing; Art's second question comes first."""
    subjects = {
        "Design": [row("validation_Design_1", "?")],
        "Art": [row("validation_Art_2", "?"), row("validation_Art_1", "?")],
        "Accounting": [row("validation_Accounting_1", "(B)"), row("validation_Accounting_2", "no", all_choices=["A"])],
    }
    for subject, rows in subjects.items():
        (tmp_path / "out" / subject).mkdir(parents=True)
        (tmp_path / "out" / subject / "output.json").write_text(json.dumps(rows))
    return tmp_path / "out"


def test_one_stream_draws_subject_by_subject_in_the_order_of_their_rows(outputs):
    scores = mmmu.score(outputs, outputs, options=options())
    stream = random.Random(42)
    assert stream.choice(["A"]) == "A"  # takes from the stream too
    drawn = {name: stream.choice([*"ABCD"]) for name in ("Art_2", "Art_1", "Design_1")}
    found = {sample.id.removeprefix("validation_"): sample.parsed for sample in scores.samples}
    assert found == {"Accounting_1": "B", "Accounting_2": "A", **drawn}
    assert scores.counts["fallback"] == 4


def test_subjects_are_drawn_for_in_the_official_order():
    """CAT_SHORT2LONG of data_utils.py is alphabetical, and has 30 subjects of six domains."""
    assert len(DOMAIN_OF) == 30 and len(set(DOMAIN_OF.values())) == 6
    order = sorted(DOMAIN_OF)
    assert order[:5] == ["Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory"]
    assert order[-4:] == ["Physics", "Psychology", "Public_Health", "Sociology"]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_letters_in_one_object_are_not_parsed(tmp_path):
    references = write(
        tmp_path / "answers.json",
        {
            "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
            "validation_Art_2": {"question_type": "multiple-choice", "ground_truth": "B"},
            "validation_Math_15": {"question_type": "short-answer", "ground_truth": ["24/7", "3.429"]},
        },
    )
    answers = {"validation_Art_1": "B", "validation_Art_2": "(B)", "validation_Math_15": "it is 24/7"}
    parsed = mmmu.score(write(tmp_path / "one.json", answers), references, options=options())
    assert [sample.score for sample in parsed.samples] == [1, 0, 1]
    assert (parsed.counts["unparsed"], parsed.counts["fallback"]) == (1, 0)

    lines = "".join(json.dumps({"id": name, "answer": answer}) + "\n" for name, answer in answers.items())
    scores = mmmu.score(write(tmp_path / "lines.jsonl", lines), references, options=options())
    assert scores.correct == 3

    megatron = [{"sample_id": name, "prediction": answer} for name, answer in answers.items()]
    assert mmmu.score(write(tmp_path / "m.json", megatron), references, options=options(parser="megatron")).correct == 3


def test_options_that_are_not_known_reach_to_what_is_named(tmp_path):
    references = write(
        tmp_path / "answers.json",
        {
            f"validation_Art_{number}": {"question_type": "multiple-choice", "ground_truth": letter}
            for number, letter in ((1, "F"), (2, "A"), (3, "A"))
        },
    )
    answers = [
        {"id": f"validation_Art_{number}", "answer": text} for number, text in ((1, "E"), (2, "G."), (3, "G or"))
    ]
    scores = mmmu.score(write(tmp_path / "p.json", answers), references, options=options(fallback="none"))
    assert [sample.parsed for sample in scores.samples] == ["E", "G", ""]


@pytest.fixture
def parquet(tmp_path):
    """The data set's layout: SUBJECT/SPLIT-*.parquet, options and several answers as text, pictures as structs."""
    pyarrow = pytest.importorskip("pyarrow")
    tables = pytest.importorskip("pyarrow.parquet")

    def write(subject, split, rows):
        folder = tmp_path / "MMMU" / subject
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            for number in range(1, 8):
                row.setdefault(f"image_{number}", None)
            row.setdefault("explanation", "?")
        tables.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")

    def picture(number):
        return {"bytes": b"picture %d" % number, "path": f"{number}.png"}

    write(
        "Math",
        "validation",
        [
            {
                "id": "validation_Math_1",
                "question": "Look at <image 2>, then at <image 1>.",
                "options": "['one', \"it's <image 3>\"]",
                "answer": "B",
                "question_type": "multiple-choice",
                **{f"image_{number}": picture(number) for number in (1, 2, 3)},
            },
            {
                "id": "validation_Math_15",
                "question": "How much?",
                "options": "[]",
                "answer": "['24/7', '3.429']",
                "question_type": "open",
                "image_1": picture(1),
            },
        ],
    )
    hidden = {"id": "test_Math_1", "question": "<image 1>?", "options": "['x', 'y']", "answer": "?"}
    write("Math", "test", [{**hidden, "question_type": "multiple-choice", "image_1": picture(1)}])
    return tmp_path / "MMMU"


def test_examples_have_the_official_prompt_and_pictures_in_their_places(parquet):
    first, second = mmmu.examples(parquet, options=options())
    assert first.prompt == (
        "Look at <image>, then at <image>.\n(A) one\n(B) it's <image>\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert first.images == (b"picture 2", b"picture 1", b"picture 3")
    assert (first.references, first.choices) == (("B",), ("A", "B"))
    assert second.prompt == "How much?\nAnswer the question using a single word or phrase."
    assert second.images == (b"picture 1",)
    assert second.references == ("24/7", "3.429")

    first, second = mmmu.examples(
        parquet / "Math" / "validation-00000-of-00001.parquet", options=options(pictures="first")
    )
    assert first.prompt.startswith("Look at <image 2>, then at <image 1>.") and first.images == (b"picture 1",)


def test_parquet_files_hold_the_options(parquet, tmp_path):
    answers = [
        {"id": "validation_Math_1", "answer": "I am sure that it's <image 3>."},
        {"id": "validation_Math_15", "answer": "3.43"},
    ]
    predictions = write(tmp_path / "p.json", answers)
    scores = mmmu.score(predictions, parquet, options=options())
    assert (scores.correct, scores.counts["without_options"], scores.counts["fallback"]) == (2, 0, 0)
    assert "B" in {sample.parsed for sample in scores.samples}


def test_the_test_split_is_written_for_the_server(parquet, tmp_path, capsys):
    predictions = write(tmp_path / "p.json", [{"id": "test_Math_1", "answer": "(B) y"}])
    with pytest.raises(ValueError, match=r"1 of 1 questions are not public, .* --submission"):
        mmmu.score(predictions, parquet, options=options(split="test"))
    load_task("mmmu").submission(predictions, parquet, tmp_path / "test.json", options(split="test"))
    assert json.loads((tmp_path / "test.json").read_text()) == {"test_Math_1": "B"}
    assert not capsys.readouterr().err

    write(predictions, [{"id": "test_Math_1", "answer": "?"}])
    mmmu.submission(predictions, parquet, tmp_path / "test.json", options(split="test"))
    assert "1 of 1 multiple-choice answers name no option" in capsys.readouterr().err


@needs_golden
def test_the_validation_split_is_written_as_officially(tmp_path):
    mmmu.submission(LLAVA, ANSWERS, tmp_path / "val.json", options())
    written = json.loads((tmp_path / "val.json").read_text())
    official = json.loads((LLAVA / "total_val_output.json").read_text())
    questions = load_questions(ANSWERS, "validation")
    assert list(written) == list(official)
    letters = {name for name, question in questions.items() if not question.is_open}
    assert all(written[name] == official[name] for name in letters) and len(letters) == 847
    assert mmmu.score(tmp_path / "val.json", ANSWERS, options=options()).correct == 330


def test_what_does_not_belong_together_is_refused(outputs, tmp_path):
    def refused(content, match, error=EvaluationError, references=outputs, **given):
        path = write(tmp_path / "p.json", content)
        with pytest.raises(error, match=match):
            mmmu.score(path, references, options=options(**given))

    names = ["Accounting_1", "Accounting_2", "Art_1", "Art_2", "Design_1"]
    whole = [{"id": f"validation_{name}", "answer": "A"} for name in names]
    refused(whole[1:], r"1 of 5 samples have no prediction \(validation_Accounting_1\)")
    refused([*whole, {"id": "test_Art_1", "answer": "A"}], "1 of 6 predictions are for samples that the references")
    refused([*whole, {"id": "validation_Art_1", "answer": "B"}], r"two different predictions \(validation_Art_1\)")
    refused([{"image_id": 1, "caption": "a"}], "a prediction has id and response, or", ValueError)
    refused([{"id": "validation_Art_1", "answer": ["A"]}], "is a text, not", ValueError)
    refused([{"id": "validation_Art_1", "answer": "A", "question_type": "open"}], "this one has answer, id", ValueError)
    refused(whole, "is a folder without validation", ValueError, references=tmp_path)
    refused(whole, "leave fallback=none out", ValueError, parser="megatron", fallback="none")
    write(tmp_path / "r.json", [{"id": "validation_Zoo_1", "question_type": "open", "answer": "a"}])
    refused(whole, "names no subject of MMMU", ValueError, references=tmp_path / "r.json")
    write(tmp_path / "r.json", [{"id": 1, "caption": "a"}])
    refused(whole, "is no question of MMMU", ValueError, references=tmp_path / "r.json")
    write(tmp_path / "r.json", [row("validation_Art_1", "A")] * 2)
    refused(whole, "has question validation_Art_1 twice", ValueError, references=tmp_path / "r.json")
    with pytest.raises(ValueError, match="holds no question: give the data set's Parquet files"):
        mmmu.examples(outputs, options=options())
    again = mmmu.score(write(tmp_path / "p.json", [*whole, whole[0]]), outputs, options=options())
    assert again.counts["repeated"] == 1 and again.correct == 5
    some = mmmu.score(write(tmp_path / "p.json", whole[2:3]), outputs, options=options(), only={"validation_Art_1"})
    assert (some.size, some.score) == (1, 100)
