"""Readers of references, exact match, and the check that predictions belong to the references."""

import json
from pathlib import Path

import pytest

from mmcore.evaluation import coco, exact_match
from mmcore.evaluation.predictions import load_predictions, read_predictions
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.task import TASKS, Example, load_task

COCO = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": "8", "file_name": "b.png"}],
    "annotations": [
        {"image_id": 8, "id": 1, "caption": "b one"},
        {"image_id": 7, "id": 2, "caption": "a one"},
        {"image_id": 7, "id": 3, "caption": "a two"},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"cocoid": 3, "filepath": "v", "filename": "x.png", "split": "train", "sentences": [{"raw": "no"}]},
        {
            "cocoid": 7,
            "filepath": "v",
            "filename": "a.png",
            "split": "test",
            "sentences": [{"raw": "a one"}, {"raw": "a two"}],
        },
        {"imgid": 8, "filename": "b.png", "split": "test", "sentences": [{"raw": "b one"}]},
    ],
}
LLAVA = [
    {
        "id": "q1",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "a cat"},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "no"},
        ],
    },
    {"id": 2, "conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "two"}]},
]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def rows(*pairs):
    return "".join(json.dumps({"id": name, "prompt": "?", "answer": answer}) + "\n" for name, answer in pairs)


def test_every_task_is_a_module_with_both_functions():
    for name in TASKS:
        task = load_task(name)
        assert callable(task.examples) and callable(task.score)
    with pytest.raises(ValueError, match=r"no task 'exact_match', did you mean 'exact-match'\?"):
        load_task("exact_match")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (COCO, ["a.png", "b.png"]),
        (KARPATHY, ["v/a.png", "b.png"]),
        (
            [{"image_id": 7, "image": "a.png", "caption": ["a one", "a two"]}, {"image_id": "8", "caption": "b one"}],
            ["a.png", None],
        ),
    ],
)
def test_captions_in_three_forms(write, content, names):
    pictures = coco.load_pictures(write("x.json", content))
    assert [(picture.id, picture.captions) for picture in pictures] == [("7", ("a one", "a two")), ("8", ("b one",))]
    assert [picture.file_name for picture in pictures] == names


def test_a_list_without_ids_has_cocos_numbers_or_the_names(write):
    names = ["val2014/COCO_val2014_000000391895.jpg", "000000000016.jpg", "val/00016.png"]
    content = [{"image": name, "caption": ["x"]} for name in names]
    assert [picture.id for picture in coco.load_pictures(write("x.json", content))] == ["391895", "16", "val/00016.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({"images": []}, "no pictures"),
        ({"a": 1}, "key 'images' is missing"),
        ([{"id": 1, "conversations": []}], "key 'image' is missing"),
        ([3], "an object is expected"),
        ({**COCO, "images": COCO["images"][:1]}, "image 8, which is not among"),
        ({**COCO, "images": [COCO["images"][0]] * 2}, "two images with the same id|not among"),
        ([{"image_id": 1, "caption": "x"}] * 2, "picture 1 twice"),
        ([{"image_id": 1, "caption": [5]}], "a caption is a text, not 5"),
        ([{"image_id": 1.5, "caption": "x"}], "an id is a number or a text, not 1.5"),
        ([{"image_id": 1, "caption": []}], "no caption to compare with, first 1"),
    ],
)
def test_captions_that_are_none(write, content, message):
    with pytest.raises(ValueError, match=message):
        coco.load_captions(write("x.json", content))


def test_examples_find_their_pictures(write, tmp_path):
    data = write("captions.json", COCO)
    for name in ("images/a.png", "images/b.png", "other/a.png"):
        write(name, "")
    found = coco.examples(data, options={})
    assert found[0] == Example(
        id="7", images=(tmp_path / "images" / "a.png",), prompt=coco.PROMPT, references=("a one", "a two")
    )
    with pytest.raises(ValueError, match=r"1 of 2 pictures are missing, the first is .*other/b.png of row 1"):
        coco.examples(data, tmp_path / "other", options={})


def test_pictures_named_from_the_files_folder(write, tmp_path):
    write("images/a.png", "")
    data = write("list.json", [{"image": "images/a.png", "caption": "x"}])
    assert coco.examples(data, options={})[0].images == (tmp_path / "images" / "a.png",)


def test_examples_without_a_file_name(write):
    with pytest.raises(ValueError, match=r"picture 391895 .* has no file name"):
        coco.examples(write("gt.json", {"images": [{"id": 391895}], "annotations": []}), options={})


def test_llava_questions(write, tmp_path):
    data = write("q.json", LLAVA)
    write("images/a.png", "")
    assert exact_match.examples(data, options={}) == [
        Example(id="q1", images=(tmp_path / "images" / "a.png",), prompt="What is it?", references=("a cat",)),
        Example(id="2", prompt="Two?", references=("two",)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x", "conversations": LLAVA[1]["conversations"][:1]}, "row 1 is not in LLaVA's format"),
        ({"id": "x", "conversations": LLAVA[1]["conversations"][::-1]}, "row 1 is not in LLaVA's format"),
        ({"conversations": LLAVA[1]["conversations"]}, "row 1 is not in LLaVA's format"),
        ("text", "row 1 is not in LLaVA's format"),
        ({**LLAVA[0], "image": None}, "1 image tags, but no picture"),
        (LLAVA[0], "id q1 twice"),
    ],
)
def test_rows_that_are_not_llavas(write, row, message):
    with pytest.raises(ValueError, match=message):
        exact_match.load_references(write("q.json", [LLAVA[0], row]))


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" a\u2028cat\n", True), ("A cat", False), ("a cat.", False), ("", False), ("a  \xa0 cat", True), ("acat", False)],
)
def test_only_white_space_is_normalised(answer, right):
    assert exact_match.matches(answer, ["dog", "a cat"]) is right


def test_exact_match_counts(write):
    data = write("captions.json", COCO)
    scores = exact_match.score(write("p.jsonl", rows(("7", "a two"), (8, "a one"))), data, options={})
    assert (scores.score, scores.correct, scores.size) == (50.0, 1, 2)
    assert scores.metrics == {"exact_match": 50.0}


def test_predictions_in_both_formats(write):
    odd = "a\u2028b\x85c"
    ours = write(
        "p.jsonl",
        "\ufeff" + json.dumps({"id": 1, "answer": odd, "x": 0}, ensure_ascii=False) + "\n\n" + rows(("2", "")),
    )
    results = write("p.json", [{"image_id": 1, "caption": odd}, {"image_id": 2, "caption": ""}])
    assert list(read_predictions(ours)) == list(read_predictions(results)) == [("1", odd), ("2", "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rows(("1", "a")) + '{"id": 2, "ans', "line 2 is not JSON"),
        ('{"id": 1, "text": "a"}', "p.jsonl: a prediction has id and answer.*this one has id, text"),
        ("[1]", "row 0: a prediction has id and answer.*this one is 1"),
        ('{"id": 1, "answer": null}', "p.jsonl: answer is a text, not None"),
        ('{"id": true, "answer": ""}', "an id is a number or a text, not True"),
        ("[{]", "is not JSON"),
    ],
)
def test_rows_that_are_no_predictions(write, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_predictions(write("p.jsonl", content)))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        list(read_predictions(tmp_path / "absent"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        list(read_predictions(tmp_path / "binary"))
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        coco.load_pictures(tmp_path)


def test_predictions_come_in_the_references_order_and_are_counted(write, tmp_path):
    path = write("p.jsonl", rows(("2", "b"), ("1", " "), ("2", "b"), ("2", "b")))
    found = load_predictions(path, ["1", "2"], tmp_path)
    assert list(found.answers.items()) == [("1", " "), ("2", "b")]
    assert found.counts == {"empty": 1, "missing": 0, "repeated": 3 - 1}
    assert [note.split(" ", 1)[0] for note in found.notes] == ["2", "1"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("1", "a")], r"1 of 2 samples have no prediction \(2\)"),
        ([], r"2 of 2 samples have no prediction \(1, 2\)"),
        (
            [("1", "a"), ("2", "b"), ("x", "c")],
            r"1 of 3 predictions are for samples that the references do not have \(x\)",
        ),
        ([("1", "a"), ("2", "b"), ("2", "c")], r"1 samples have two different predictions \(2\)"),
    ],
)
def test_predictions_of_something_else(write, tmp_path, pairs, message):
    with pytest.raises(EvaluationError, match=message):
        load_predictions(write("p.jsonl", rows(*pairs)), ["1", "2"], tmp_path)


def test_an_object_of_captions(write):
    data = write("refs.json", {"a": ["one", "two"], "7": ["three"]})
    assert coco.load_captions(data) == {"a": ("one", "two"), "7": ("three",)}


def test_the_guide_has_every_task():
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for name in TASKS:
        task = load_task(name)
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        _, _, _, metric, options, submission, _ = row.split("|")
        assert metric.strip() == f"`{task.METRIC}`"
        told = "; ".join(f"`{option}`: {', '.join(values)}" for option, values in task.OPTIONS.items())
        assert options.strip() == (told or "-")
        assert (submission.strip() == "yes") == hasattr(task, "submission")
        assert task.METRIC in task.SCALES
