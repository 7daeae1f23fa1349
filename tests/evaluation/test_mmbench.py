"""MMBench: published scores to the digit, the matching rules, passes by rows present, its files, wrong inputs."""

import base64
import csv
import json
from pathlib import Path

import pytest

from mmcore.evaluation import mmbench
from mmcore.evaluation.metrics.options import infer_option
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.task import read_options

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
SUBSET = GOLDEN / "mmbench_dev" / "open_subset_200groups.jsonl"
SAMPLES = GOLDEN / "mmbench_samples"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden beside the project")
COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "split",
)
PICTURE = base64.b64encode(b"picture " * 10).decode()  # longer than an index


def options(**given: str) -> dict[str, str]:
    return read_options("mmbench", [f"{name}={value}" for name, value in given.items()])


@needs_golden
def test_llava_has_the_known_circular_and_vanilla_accuracy():
    """expected.json of the golden set: 148 and 171 of 200. (All 4377 rows have 796 of 1176, the published 67.7.)"""
    right = json.loads((SUBSET.parent / "expected.json").read_text())["open_subset_200groups"]
    scores = mmbench.score(SUBSET, SUBSET, options=options())
    assert (scores.correct, scores.size) == (right["circular_correct"], right["groups"]) == (148, 200)
    assert scores.metrics == {
        "circular": 100 * right["circular_correct"] / right["groups"],
        "vanilla": 100 * right["vanilla_correct"] / right["groups"],
    }
    assert len(scores.samples) == right["rows"] and scores.counts["unparsed"] == 0


@needs_golden
def test_the_server_takes_what_is_submitted_and_it_scores_the_same(tmp_path):
    """Columns that scripts/mmb_eval_gradio.py of VLMEvalKit asks for; ours, as XLSX, TSV and lines, to and fro."""
    openpyxl = pytest.importorskip("openpyxl")
    rows = [json.loads(line) for line in SUBSET.read_text().splitlines()]
    ours = write_lines(
        tmp_path / "ours.jsonl", [{"id": str(row["index"]), "answer": row["prediction"]} for row in rows]
    )
    mmbench.submission(ours, SUBSET, tmp_path / "upload.xlsx", options())
    names, *cells = openpyxl.load_workbook(tmp_path / "upload.xlsx").active.iter_rows(values_only=True)
    assert names == ("index", "question", "A", "B", "C", "D", "answer", "prediction")
    assert [row[0] for row in cells] == [row["index"] for row in rows]
    scores = mmbench.score(tmp_path / "upload.xlsx", tmp_path / "upload.xlsx", options=options())
    assert scores.metrics == {"circular": 74.0, "vanilla": 85.5}
    with pytest.raises(ValueError, match=r"whose name ends with \.xlsx"):
        mmbench.submission(ours, SUBSET, tmp_path / "upload.csv", options())


def test_options_are_inferred_as_officially():
    """Each line is a rule of matching_util.py."""
    choices = {"A": "cat", "B": "dog", "C": "red cat", "D": "None"}
    for answer, letter in {
        "B": "B",
        "(B)": "B",
        "**B**": "B",
        "B. dog": "B",
        "I choose option B!": "B",
        "B is what I would say here": None,  # not among the last four words
        "B is what I say": None,  # one letter, but first of five words; and no text
        "A or B": None,
        "a": None,
        "It is a dog": "B",
        "a red cat": None,  # two texts are in it
        "none": "D",
        "The answer is B or C": "B",
        "The correct answer is **c**, not A and not B": "C",
        "the answer is clear": "C",  # so it is
        "Z": "Z",
        "Cannot determine the answer, B": "Z",
        "Failed to obtain answer via API B": None,
        "dog" + "!" * 32: None,  # longer than twice all options
        "dog" + "!" * 31: "B",
        "": None,
    }.items():
        assert infer_option(answer, choices) == letter, answer
    assert infer_option("选B", {"A": "猫", "B": "狗"}) is None
    assert infer_option("是一只狗", {"A": "猫", "B": "狗"}) == "B"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, COLUMNS, delimiter="\t", restval="")
        table.writeheader()
        table.writerows(rows)
    return path


def asked(index, answer, *choices, **more):
    row = {"index": index, "question": "Which?", "answer": answer, "image": PICTURE, "split": "dev"}
    return row | dict(zip("ABCD", choices, strict=False)) | more


@pytest.fixture
def table(tmp_path):
    """Three questions: of two passes, of three (with four options, as 53 in MMBench have), and without the first."""
    logic, scene = (
        {"l2-category": "reasoning", "category": "logic"},
        {"l2-category": "perception", "category": "scene"},
    )
    rows = [
        asked(7, "A", "cat", "None", **logic),
        asked(1_000_007, "B", "None", "cat", **logic),
        asked(9, "D", "one", "two", "three", "NA", **scene),
        asked(1_000_009, "C", "two", "three", "NA", "one", **scene),
        asked(2_000_009, "B", "three", "NA", "one", "two", **scene),
        asked(1_000_011, "A", "x", "y", **scene),
    ]
    return write_table(tmp_path / "dev.tsv", rows)


def test_a_question_has_the_passes_that_have_rows(table, tmp_path):
    answers = {7: "A", 1_000_007: "the cat", 9: "D", 1_000_009: "na", 2_000_009: "D", 1_000_011: "A"}
    lines = write_lines(tmp_path / "p.jsonl", [{"index": index, "prediction": text} for index, text in answers.items()])
    scores = mmbench.score(lines, table, options=options())
    assert scores.metrics == {"circular": 50, "vanilla": 100}
    assert (scores.correct, scores.size, len(scores.samples)) == (1, 2, 6)
    assert [sample.parsed for sample in scores.samples] == ["A", "B", "D", "C", "D", "A"]
    assert {kind: {name: group.score for name, group in part.items()} for kind, part in scores.groups.items()} == {
        "l2-category": {"perception": 0, "reasoning": 100},
        "category": {"logic": 100, "scene": 0},
    }
    assert scores.counts["without_first_pass"] == 1
    assert "1 rows do not count: questions without a first pass, such as 1000011's" in scores.notes[-1]
    assert set(scores.intervals()) == {"circular", "vanilla"}

    answers |= {2_000_009: "I do not know", 1_000_007: ""}
    lines = write_lines(tmp_path / "p.jsonl", [{"question_id": index, "text": text} for index, text in answers.items()])
    scores = mmbench.score(lines, table, options=options())
    assert (scores.correct, scores.counts["unparsed"], scores.counts["empty"]) == (0, 2, 1)
    assert "2 of 6 answers name no option by the rules (the first is of row 1000007)" in scores.notes[1]


def test_one_pass_alone_is_told(table, tmp_path):
    lines = write_lines(tmp_path / "p.jsonl", [{"id": 7, "answer": "A"}, {"id": "9", "answer": "A"}])
    scores = mmbench.score(lines, table, options=options(), only={"7", "9"})
    assert scores.metrics == {"circular": 50, "vanilla": 50}
    assert scores.notes == ("no question is asked in a second order: circular is the same as vanilla",)
    (tmp_path / "p.json").write_text('{"7": "A", "9": "D"}')
    assert mmbench.score(tmp_path / "p.json", table, options=options(), only={"7", "9"}).score == 100
    lines = write_lines(tmp_path / "p.jsonl", [{"id": 1_000_007, "answer": "A"}])
    with pytest.raises(EvaluationError, match="no question's first pass"):
        mmbench.score(lines, table, options=options(), only={"1000007"})


def test_tables_that_pandas_wrote_are_read(tmp_path):
    """Numbers for texts, floats for indices, nan for nothing; the right option's text is lost where it was None."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (
        ("Index", "question", "A", "B", "C", "answer", "L2-Category", "Prediction"),
        (1, "1 + 1?", 2, True, None, "A", "math", 2),
        (1_000_001, "1 + 1?", True, 2, None, "B", "math", "B"),
        (2.0, "Any?", "one", "two", None, "C", "math", "C"),
    ):
        book.active.append(row)
    book.save(tmp_path / "all.xlsx")
    scores = mmbench.score(tmp_path / "all.xlsx", tmp_path / "all.xlsx", options=options())
    assert scores.metrics == {"circular": 100, "vanilla": 100}
    assert scores.groups["l2-category"]["math"].num_samples == 2

    rows = [{"index": 1.0, "question": "?", "A": "x", "B": "y", "C": "nan", "D": float("nan"), "answer": "B"}]
    lines = write_lines(tmp_path / "all.jsonl", [row | {"prediction": "C"} for row in rows])
    scores = mmbench.score(lines, lines, options=options())
    assert (scores.score, scores.counts["unparsed"]) == (0, 1)


@needs_golden
@pytest.mark.parametrize("language", ["en", "cn"])
@pytest.mark.parametrize("layout", ["legacy", "shared", "paths"])
def test_real_questions_are_asked_in_every_order(tmp_path, language, layout):
    """Twenty of MMBench's questions, as its tables hold them: with all pictures, with the first pass's, with names."""
    rows = []
    for sample in json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8")):
        question = sample[language]
        letters, texts = list(question["options"]), list(question["options"].values())
        picture = base64.b64encode((SAMPLES / sample["image"]).read_bytes()).decode()
        for turn in range(len(letters)):
            index = sample["index"] + turn * 1_000_000
            cell = {"legacy": picture, "shared": picture if not turn else sample["index"], "paths": sample["image"]}
            at = letters[(letters.index(question["answer"]) - turn) % len(letters)]
            turned = [*texts[turn:], *texts[:turn]]
            row = asked(index, at, *turned, question=question["question"], image=cell[layout])
            rows.append(row | {"category": sample["category"], "l2-category": sample["l2_category"]})
    table = write_table(tmp_path / "table.tsv", rows)
    images = SAMPLES if layout == "paths" else None
    examples = mmbench.examples(table, images, options=options())
    assert [example.id for example in examples] == [str(row["index"]) for row in rows]
    last = {"en": "\nAnswer with the option's letter from the given choices directly.", "cn": "\n请直接回答选项字母。"}
    for example, row in zip(examples, rows, strict=True):
        assert example.prompt.startswith(f"{row['question']}\nA. {row['A']}\nB. ")
        assert example.prompt.endswith(last[language])
        assert example.references == (row["answer"],)
        (picture,) = example.images
        expected = SAMPLES / "images" / f"{row['index'] % 1_000_000}.jpg"
        assert picture == expected if layout == "paths" else picture == expected.read_bytes()

    # Whoever always says A is right where A is, which it is in one pass of each.
    lines = write_lines(tmp_path / "p.jsonl", [{"id": example.id, "answer": "A"} for example in examples])
    scores = mmbench.score(lines, table, options=options())
    first = [row["answer"] for row in rows if row["index"] < 1_000_000]
    assert scores.metrics == {"circular": 0, "vanilla": pytest.approx(100 * first.count("A") / len(first))}
    assert scores.size == 20
    # Whoever says the right option's text is right, but where the rules read a letter in it:
    lines = write_lines(tmp_path / "p.jsonl", [{"id": str(row["index"]), "answer": row[row["answer"]]} for row in rows])
    # "Solution B" as option A, or C, is option B to them.
    scores = mmbench.score(lines, table, options=options())
    assert scores.metrics == {"circular": 95, "vanilla": 100}
    assert [sample.id for sample in scores.samples if not sample.score] == ["1000318", "2000318"]


def test_prompts_are_those_of_llava(table, tmp_path):
    first, *_ = mmbench.examples(table, options=options())
    assert first.prompt == "Which?\nA. cat\nB. None\nAnswer with the option's letter from the given choices directly."
    assert (first.choices, first.references, first.images) == (("A", "B"), ("A",), (b"picture " * 10,))
    assert mmbench.examples(table, options=options(language="cn"))[0].prompt.endswith("\n请直接回答选项字母。")
    hinted = [asked(1, "A", "x", hint="Read."), asked(2, "A", "x", hint="nan"), asked(3, "A", "x", hint="None")]
    prompts = [
        example.prompt for example in mmbench.examples(write_table(tmp_path / "h.tsv", hinted), options=options())
    ]
    assert prompts[0].startswith("Read.\nWhich?\nA. x\n") and prompts[1] == prompts[2] == prompts[0][6:]


def test_parquet_holds_pictures(tmp_path):
    """lmms-lab/MMBench on Hugging Face: structs of bytes, and "nan" for what is not there."""
    pyarrow = pytest.importorskip("pyarrow")
    tables = pytest.importorskip("pyarrow.parquet")
    row = asked(3, "B", "x", "y", "nan", "nan", hint="nan", image={"bytes": b"p", "path": None}, **{"L2-category": "l"})
    tables.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "dev.parquet")
    (example,) = mmbench.examples(tmp_path / "dev.parquet", options=options())
    assert example.images == (b"p",) and example.choices == ("A", "B")
    lines = write_lines(tmp_path / "p.jsonl", [{"id": "3", "answer": "y"}])
    scores = mmbench.score(lines, tmp_path / "dev.parquet", options=options())
    assert scores.score == 100 and list(scores.groups["l2-category"]) == ["l"]


def test_the_test_split_is_written_for_the_server(tmp_path, capsys):
    openpyxl = pytest.importorskip("openpyxl")
    table = write_table(tmp_path / "test.tsv", [asked(1, "", "=x", "y", category="c"), asked(2, "", "x", "y")])
    lines = write_lines(tmp_path / "p.jsonl", [{"id": "1", "answer": "=A\x0b"}, {"id": "2", "answer": ""}])
    with pytest.raises(ValueError, match=r"2 of 2 rows have no answer, the first is 1: .* --submission"):
        mmbench.score(lines, table, options=options())
    mmbench.submission(lines, table, tmp_path / "test.xlsx", options())
    names, first, _ = openpyxl.load_workbook(tmp_path / "test.xlsx").active.iter_rows()
    assert [cell.value for cell in names] == [*(name for name in COLUMNS if name != "image"), "prediction"]
    cells = dict(zip([cell.value for cell in names], first, strict=True))
    assert (cells["index"].value, cells["A"].value, cells["prediction"].value) == (1, "=x", "=A")
    assert {cells["A"].data_type, cells["prediction"].data_type} == {"s"}
    assert "1 of 2 answers are empty" in capsys.readouterr().err

    rows = write_lines(tmp_path / "r.jsonl", [{"question": "?", "A": "x", "index": index} for index in (1, 2)])
    mmbench.submission(lines, rows, tmp_path / "test.xlsx", options())
    names, first, _ = openpyxl.load_workbook(tmp_path / "test.xlsx").active.iter_rows(values_only=True)
    assert (names, first) == (("index", "question", "A", "prediction"), (1, "?", "x", "=A"))


def test_what_does_not_belong_together_is_refused(table, tmp_path):
    def refused(rows, match, error=EvaluationError, references=table):
        path = write_lines(tmp_path / "p.jsonl", rows)
        with pytest.raises(error, match=match):
            mmbench.score(path, references, options=options())

    indices = (7, 1_000_007, 9, 1_000_009, 2_000_009, 1_000_011)
    whole = [{"id": index, "answer": "A"} for index in indices]
    refused(whole[:-1], r"1 of 6 samples have no prediction \(1000011\)")
    refused([*whole, {"id": 8, "answer": "A"}], r"references do not have \(8\)")
    refused([*whole, {"id": 7, "answer": "B"}], r"two different predictions \(7\)")
    refused([{"image_id": 1, "caption": "a"}, {}], "a prediction has index and prediction, or", ValueError)
    refused([{"id": "x", "answer": "a"}], "an index of MMBench is a whole number, not 'x'", ValueError)
    refused([{"question_id": 7, "answer": "A"}, {}], "a prediction has index and prediction", ValueError)
    refused(["a"], "are rows with columns", ValueError)
    refused([{"index": 7, "question": "?", "answer": "A"}], "whole number, not 'index'", ValueError)
    again = mmbench.score(write_lines(tmp_path / "p.jsonl", [*whole, whole[0]]), table, options=options())
    assert again.counts["repeated"] == 1

    def broken(rows, match, read=mmbench.load_rows):
        with pytest.raises(ValueError, match=match):
            read(write_table(tmp_path / "broken.tsv", rows))

    broken([], "holds no rows")
    broken([asked(7, "A", "x")] * 2, "has index 7 twice")
    broken([asked(7, "the cat", "x")], "the answer 'the cat' is no option's letter")
    broken([asked("", "A", "x")], "a whole number, not ''")

    def ask(path):
        mmbench.examples(path, options=options())

    broken([asked(7, "A", "x", image="")], r"row 1 \(index 7\) has no picture", ask)
    broken([asked(7, "A", "x", image="8")], "has no picture", ask)
    broken([asked(7, "A", "x", image="x.jpg")], "1 of 1 pictures are missing", ask)
    broken([asked(7, "A", "x", image="?" * 80)], "the picture is not base64", ask)
    with pytest.raises(ValueError, match="MMBench's rows have index, question"):
        mmbench.load_rows(write_lines(tmp_path / "r.jsonl", [{"id": 1, "text": "a"}]))
