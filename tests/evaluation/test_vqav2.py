"""VQAv2 and those with its rule, OK-VQA, TextVQA, VizWiz: files in every form, scores, what servers take."""

import base64
import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.short_answers import SHORT_ANSWER
from mmcore.evaluation.task import load_task, read_options

# Type of answer, type of question, ten people, an answer.
ROWS = [
    ("yes/no", "is the", ["yes"] * 10, "Yes."),
    ("yes/no", "is the", ["yes"] * 9 + ["no"], "Yes."),
    ("number", "how many", ["2"] * 3 + ["two"] * 2 + ["3"] * 5, "Two"),
    ("number", "how many", ["1,000"] + ["10"] * 9, "1,000"),
    ("other", "what is", ["left,right"] * 2 + ["left right"] + ["a dog"] * 7, "left/right!"),
    ("other", "what is", ["dont know"] * 4 + ["red"] * 6, "don't know"),
    ("other", "what color", ["the cat's"] * 2 + ["red?"] * 8, "cat's"),
    ("other", "what color", ["red"] * 10, " red\n"),
]
# By vqaEval.py at commit a013f00, run on these rows.
OFFICIAL = {"yes/no": 50.0, "number": 65.0, "other": 87.5}
OFFICIAL_QUESTIONS = {"is the": 50.0, "how many": 65.0, "what is": 95.0, "what color": 80.0}
PICTURE = b"\x89PNG" + bytes(range(256)) * 4

ANNOTATIONS = {
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_id": 1000 + index,
            "image_id": 42,
            "answer_type": answer_type,
            "question_type": question_type,
            "multiple_choice_answer": people[0],
            "answers": [
                {"answer": said, "answer_confidence": "yes", "answer_id": number}
                for number, said in enumerate(people, 1)
            ],
        }
        for index, (answer_type, question_type, people, _) in enumerate(ROWS)
    ],
}
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 1000 + index, "image_id": 42, "question": f"What is {index}?"} for index in range(len(ROWS))
    ],
}
RESULTS = [{"question_id": 1000 + index, "answer": answer} for index, (*_, answer) in enumerate(ROWS)]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def official(write):
    write("v2_OpenEnded_mscoco_val2014_questions.json", QUESTIONS)
    return write("results.json", RESULTS), write("v2_mscoco_val2014_annotations.json", ANNOTATIONS)


def score(task, predictions, references, *options, only=None):
    return load_task(task).score(predictions, references, options=read_options(task, options), only=only)


def examples(task, data, images=None):
    return load_task(task).examples(data, images, options=read_options(task))


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("vqav2", [], 72.5),
        ("okvqa", [], 72.5),
        ("textvqa", [], 77.5),
        ("vizwiz", [], 52.5),
        ("textvqa", ["mode=vqa"], 72.5),
        ("vqav2", ["mode=m4c"], 77.5),
        ("vizwiz", ["mode=min3"], 87.5),
    ],
)
def test_scores_are_those_of_the_scorers(official, task, options, expected):
    """Each measured with the benchmark's own code, see test_soft_accuracy.py."""
    scores = score(task, *official, *options)
    assert scores.score == pytest.approx(expected, abs=1e-12)
    assert scores.scorer["mode"] == (options[0][5:] if options else "official")


def test_groups_counts_and_samples(official):
    scores = score("vqav2", *official)
    groups = {kind: {name: group.score for name, group in parts.items()} for kind, parts in scores.groups.items()}
    assert groups == {"answer type": pytest.approx(OFFICIAL), "question type": pytest.approx(OFFICIAL_QUESTIONS)}
    assert scores.groups["answer type"]["other"].num_samples == 4
    assert scores.counts == {"empty": 0, "missing": 0, "repeated": 0, "wrong as written": 1}
    assert any(note.startswith("1 answers are wrong by no more than capitals") for note in scores.notes)
    assert (scores.samples[1].id, scores.samples[1].parsed, scores.samples[1].group) == ("1001", "yes", "yes/no")
    assert scores.correct is None
    low, high = scores.intervals()["accuracy"]
    assert 0 < low < 72.5 < high <= 100


def test_only_some(write, official):
    some = score("vqav2", write("two.json", RESULTS[:2]), official[1], only={"1000", "1001"})
    assert (some.score, some.size) == (50.0, 2)


def test_either_file_or_one_with_both(write, official):
    predictions, annotations = official
    questions = annotations.with_name("v2_OpenEnded_mscoco_val2014_questions.json")
    merged = write("merged.json", {**QUESTIONS, **ANNOTATIONS})
    for path in (annotations, questions, merged):
        assert score("vqav2", predictions, path).score == pytest.approx(72.5)
    write("images/val2014/COCO_val2014_000000000042.jpg", PICTURE)
    for path in (annotations, questions, merged):
        example = examples("vqav2", path)[7]
        assert (example.id, example.prompt) == ("1007", "What is 7?" + SHORT_ANSWER)
        assert example.images == (path.parent / "images" / "val2014" / "COCO_val2014_000000000042.jpg",)
        assert example.references == ("red",) * 10


def test_the_other_file_is_missing(write):
    annotations = write("v2_mscoco_val2014_annotations.json", ANNOTATIONS)
    with pytest.raises(ValueError, match=r"has no questions.*v2_OpenEnded_mscoco_val2014_questions.json is looked for"):
        examples("vqav2", annotations)
    questions = write("OpenEnded_mscoco_train2014_questions.json", QUESTIONS)
    with pytest.raises(ValueError, match="has no annotations, and no file beside it has them"):
        score("vqav2", write("r.json", RESULTS), questions)


def test_test_splits_go_to_the_server(write, tmp_path):
    """Questions alone; LLaVA's files have answers to test-dev only, and are normalised first."""
    questions = write("v2_OpenEnded_mscoco_test-dev2015_questions.json", {**QUESTIONS, "data_subtype": "test-dev2015"})
    write("test2015/COCO_test2015_000000000042.jpg", PICTURE)
    assert [path.name for path in examples("vqav2", questions)[0].images] == ["COCO_test2015_000000000042.jpg"]
    answers = write("a.jsonl", [{"question_id": 1000, "prompt": "?", "text": "The Cat.", "metadata": {}}])
    for mode, said in (("official", "The Cat."), ("m4c", "cat")):
        output = tmp_path / "out.json"
        load_task("vqav2").submission(answers, questions, output, read_options("vqav2", [f"mode={mode}"]))
        rows = json.loads(output.read_text())
        assert rows[:2] == [{"question_id": 1000, "answer": said}, {"question_id": 1001, "answer": ""}]
        assert len(rows) == len(ROWS)
    with pytest.raises(EvaluationError, match=r"8 of 8 samples have no prediction"):
        load_task("textvqa").submission(write("b.jsonl", []), questions, tmp_path / "x", read_options("textvqa"))


def test_tables_of_hugging_face(write, tmp_path):
    rows = [
        {
            "question_id": 1000 + index,
            "question": f"What is {index}?",
            "answers": row["answers"],
            "answer_type": row["answer_type"],
            "image": {"bytes": PICTURE, "path": None},
        }
        for index, row in enumerate(ANNOTATIONS["annotations"])
    ]
    write("shards/data-0.parquet", rows[:5])
    write("shards/data-1.parquet", rows[5:])
    predictions = write("p.jsonl", [{"id": row["question_id"], "answer": row["answer"]} for row in RESULTS])
    scores = score("vqav2", predictions, tmp_path / "shards")
    assert scores.score == pytest.approx(72.5)
    assert list(scores.groups) == ["answer type"]
    assert examples("vqav2", tmp_path / "shards" / "data-1.parquet")[0].images == (PICTURE,)
    with pytest.raises(ValueError, match="is a folder without Parquet tables"):
        score("vqav2", predictions, write("empty/x.txt", "").parent)


def test_okvqas_types_have_names(write):
    annotations = {**ANNOTATIONS, "question_types": {"is the": "Plants and Animals"}}
    scores = score("okvqa", write("r.json", RESULTS), write("mscoco_val2014_annotations.json", annotations))
    assert list(scores.groups["question type"]) == ["Plants and Animals", "how many", "what color", "what is"]


@pytest.fixture
def textvqa(write):
    return write(
        "TextVQA_0.5.1_val.json",
        {
            "dataset_name": "textvqa",
            "data": [
                {"question_id": 7, "image_id": "ab", "question": "what brand is it?", "answers": ["nokia"] * 10},
                {"question_id": 8, "image_id": "ab", "question": "what time?", "answers": ["5:10"] * 2 + ["5"] * 8},
                {"question_id": 9, "image_id": "cd", "question": "what brand is it?", "answers": ["a", *"bcdefghij"]},
            ],
        },
    )


def test_textvqa_as_published_and_as_llava_answers(write, textvqa):
    """LLaVA's question_id is the picture's; its prompt has the question in a line, and words of the picture or not."""
    write("train_images/ab.jpg", PICTURE)
    write("train_images/cd.jpg", PICTURE)
    found = examples("textvqa", textvqa)
    assert [example.images[0].name for example in found] == ["ab.jpg", "ab.jpg", "cd.jpg"]
    assert found[0].prompt == "what brand is it?" + SHORT_ANSWER
    ours = write("p.jsonl", [{"id": 7, "answer": "Nokia"}, {"id": 8, "answer": "5:10"}, {"id": 9, "answer": "z"}])
    assert score("textvqa", ours, textvqa).score == pytest.approx(100 * 1.6 / 3)
    assert score("textvqa", ours, textvqa, "mode=vqa").score == pytest.approx(100 * 0.6 / 3)
    rows = [
        {"question_id": "cd", "prompt": "What brand is it?" + SHORT_ANSWER, "text": "z"},
        {"question_id": "ab", "prompt": "What time?\nReference OCR token: 5, 10" + SHORT_ANSWER, "text": "5:10"},
        {"question_id": "ab", "prompt": "What brand is it?" + SHORT_ANSWER, "text": "Nokia"},
    ]
    scores = score("textvqa", write("l.jsonl", rows), textvqa)
    assert [sample.answer for sample in scores.samples] == ["Nokia", "5:10", "z"]
    assert scores.score == pytest.approx(100 * 1.6 / 3)
    rows[0]["prompt"] = "Who?" + SHORT_ANSWER
    with pytest.raises(EvaluationError, match=r"1 of 3 samples have no prediction \(9\).*cd: Who\?"):
        score("textvqa", write("l.jsonl", rows), textvqa)


def test_vlmevalkits_tables(write):
    row = ["3", "what?", str(["red"] * 10), base64.b64encode(PICTURE).decode()]
    table = write("TextVQA_VAL.tsv", "index\tquestion\tanswer\timage\n" + "\t".join(row) + "\n")
    answers = write("out.tsv", "index\tquestion\tanswer\tprediction\n3\twhat?\t['red']\tRed\n")
    assert score("textvqa", answers, table).score == 100
    assert examples("textvqa", table)[0].images == (PICTURE,)


@pytest.fixture
def vizwiz(write):
    people = [{"answer": said, "answer_confidence": "maybe"} for said in ["unanswerable"] * 8 + ["Grey", "grey"]]
    rows = [
        {"image": f"VizWiz_val_0000000{index}.jpg", "question": "What?", "answers": people, "answer_type": "other"}
        for index in range(2)
    ]
    return write("val.json", rows)


def test_vizwiz_knows_questions_by_their_pictures(write, vizwiz, tmp_path):
    write("val/VizWiz_val_00000000.jpg", PICTURE)
    write("val/VizWiz_val_00000001.jpg", PICTURE)
    example = examples("vizwiz", vizwiz, tmp_path / "val")[0]
    assert (example.id, example.images) == ("VizWiz_val_00000000.jpg", (tmp_path / "val/VizWiz_val_00000000.jpg",))
    assert example.prompt.startswith(
        "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    )
    official = [{"image": f"VizWiz_val_0000000{index}.jpg", "answer": said} for index, said in enumerate(("grey", "X"))]
    bare = [{"question_id": row["image"][:-4], "text": row["answer"]} for row in official]
    # Of the two who say grey one writes it with a capital, and people's answers are not normalised.
    for answers in (write("r.json", official), write("r.jsonl", bare)):
        assert score("vizwiz", answers, vizwiz).score == pytest.approx(100 * 0.3 / 2)
        assert score("vizwiz", answers, vizwiz, "mode=m4c").score == pytest.approx(100 * 0.6 / 2)
        load_task("vizwiz").submission(answers, vizwiz, tmp_path / "out.json", read_options("vizwiz"))
        assert json.loads((tmp_path / "out.json").read_text()) == official


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"question_id": 1, "question": "?", "answers": ["a"]}], "1 of 1 questions have one answer, the first is 1"),
        ([{"question_id": 1, "question": "?"}], "1 of 1 questions have no answer.*--submission writes"),
        ([{"question_id": 1, "answers": [""] * 10}], "1 of 1 questions have no answer"),
        ([{"question_id": 1, "answers": ["a", "b"]}] * 2, "question 1 twice"),
        ([{"question": "?"}], "row 0 is no question with an id: it has question"),
        ([3], "row 0 is no question but 3"),
        ([], "has no rows"),
        ({"annotations": []}, "has no questions"),
        ({"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}, r"annotations\[0\] has no question_id"),
        ([{"question_id": 1, "answers": [["a"]]}], "texts are expected"),
        ({**ANNOTATIONS, "annotations": ANNOTATIONS["annotations"][:1] * 2}, "question 1000 twice"),
    ],
)
def test_files_of_something_else(write, content, message):
    with pytest.raises(ValueError, match=message):
        score("vqav2", write("r.json", RESULTS), write("references.json", content))


def test_answers_of_something_else(write, official):
    with pytest.raises(EvaluationError, match="1 of 8 samples have no prediction"):
        score("vqav2", write("r.json", RESULTS[1:]), official[1])
    with pytest.raises(ValueError, match="1 of 1 samples have no question, the first is 1000"):
        examples("vqav2", write("x.json", [{"question_id": 1000, "answers": ["a", "b"], "image": "a.jpg"}]))
    with pytest.raises(ValueError, match="1 questions name no picture, the first is 1"):
        examples("vqav2", write("x.json", [{"question_id": 1, "question": "?"}]))
