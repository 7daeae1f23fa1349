"""DocVQA and InfographicVQA against the server's script, and their files."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation import docvqa, infovqa
from mmcore.evaluation.metrics.anls import anls, levenshtein
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.short_answers import SHORT_ANSWER

# References, an answer, and what infographicsvqa_eval.py (Qwen-VL, commit aa00ed0) gave for it when it was run.
MEASURED = [
    (["Coca Cola"], "coca cola", 1.0),
    (["Coca Cola", "coke"], "COKE", 1.0),
    (["12,000"], "12000", 1 - 1 / 6),
    (["half"], "ha", 0.5),
    (["half"], "h", 0.0),
    (["new  york"], "New York", 1.0),
    (["ab"], " a ", 0.6666666666666667),
    (["ab"], "   a   ", 0.8571428571428572),
    (["stra\u00dfe"], "strasse", 0.7142857142857143),
    (["a"], "", 0.0),
]


@pytest.mark.parametrize(("references", "answer", "expected"), MEASURED)
def test_anls_is_that_of_the_servers_script(references, answer, expected):
    """White space does not count in the distance, but it does in the length that the distance is divided by."""
    assert anls(answer, references) == expected


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_levenshtein(first, second, distance):
    assert levenshtein(first, second) == levenshtein(second, first) == distance


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def files(write):
    rows = [
        {
            "questionId": 100 + index,
            "question": "Which?",
            "image": f"documents/p{index}.png",
            "answers": references,
            "question_types": ["layout", "form"] if index % 2 else ["table/list"],
        }
        for index, (references, _, _) in enumerate(MEASURED)
    ]
    results = [{"questionId": 100 + index, "answer": answer} for index, (_, answer, _) in enumerate(MEASURED)]
    content = {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": rows}
    return write("results.json", results), write("val_v1.0_withQT.json", content)


def test_docvqa(files):
    scores = docvqa.score(*files, options={})
    assert scores.score == pytest.approx(sum(row[2] for row in MEASURED) / len(MEASURED), abs=1e-15)
    assert scores.scales == {"anls": "0 to 1"}
    assert [sample.score for sample in scores.samples] == [row[2] for row in MEASURED]
    types = scores.groups["question type"]
    assert {name: group.num_samples for name, group in types.items()} == {"form": 5, "layout": 5, "table/list": 5}
    assert types["form"].score == pytest.approx(sum(row[2] for row in MEASURED[1::2]) / 5)
    assert scores.counts["empty"] == 1


@pytest.mark.parametrize("folder", ["documents", "images", "images/documents", "."])
def test_pictures_lie_where_they_were_unpacked(write, files, folder, tmp_path):
    for index in range(len(MEASURED)):
        write(f"{folder}/p{index}.png", "x")
    found = docvqa.examples(files[1], options={})
    assert found[3].images[0].resolve() == (tmp_path / folder / "p3.png").resolve()
    assert (found[3].id, found[3].prompt, found[3].references) == ("103", "Which?" + SHORT_ANSWER, ("half",))


def test_the_server_takes_every_question(write, files, tmp_path):
    rows = [{"questionId": name, "question": "?", "image": "a.png", "answers": None} for name in (5, 6)]
    references = write("test_v1.0.json", {"dataset_name": "SP-DocVQA", "data": rows})
    with pytest.raises(ValueError, match=r"2 of 2 questions have no answer to compare with.*--submission"):
        docvqa.score(files[0], references, options={})
    answers = write("p.jsonl", '{"id": "6", "answer": "x"}\n{"id": "5", "answer": "y"}\n')
    docvqa.submission(answers, references, tmp_path / "out.json", {})
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"questionId": 5, "answer": "y"},
        {"questionId": 6, "answer": "x"},
    ]
    with pytest.raises(EvaluationError, match=r"1 of 2 samples have no prediction \(6\)"):
        infovqa.submission(write("p.jsonl", '{"id": "5", "answer": "y"}\n'), references, tmp_path / "x", {})


def test_infovqa_as_published_and_as_a_table(write, tmp_path):
    rows = [
        {
            "questionId": name,
            "question": "How many?",
            "answers": ["4", "four"],
            "answer_type": ["non span"],
            "evidence": ["figure", "textual"],
            "operation/reasoning": ["counting"] if name == 5 else [],
        }
        for name in (5, 6)
    ]
    published = {"dataset_name": "infographicVQA", "data": [{**row, "image_local_name": "1.jpeg"} for row in rows]}
    tables = [{**row, "questionId": str(row["questionId"]), "image": {"bytes": b"JPEG", "path": ""}} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tables), tmp_path / "val.parquet")
    answers = write("p.jsonl", '{"id": 5, "answer": "Four"}\n{"id": 6, "answer": "5"}\n')
    for references in (write("infographicsVQA_val_v1.0_withQT.json", published), tmp_path / "val.parquet"):
        scores = infovqa.score(answers, references, options={})
        assert scores.score == 0.5
        groups = {kind: {name: group.score for name, group in row.items()} for kind, row in scores.groups.items()}
        assert groups == {
            "answer type": {"non span": 0.5},
            "evidence": {"figure": 0.5, "textual": 0.5},
            "reasoning": {"counting": 1.0},
        }
    write("images/1.jpeg", "x")
    assert infovqa.examples(tmp_path / "infographicsVQA_val_v1.0_withQT.json", options={})[0].images == (
        tmp_path / "images" / "1.jpeg",
    )
    assert infovqa.examples(tmp_path / "val.parquet", options={})[0].images == (b"JPEG",)
