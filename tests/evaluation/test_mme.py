"""MME: the published score of LaVIN, what counts as yes and no, and every form of the questions and of the answers."""

import json
import zipfile

import pytest

from mmcore.evaluation import mme
from mmcore.evaluation.scores import EvaluationError

HINT = "Please answer yes or no."

# LaVIN's answers in MME's eval_tool, judged: pictures with both questions right, with one, with none.
LAVIN = {
    "existence": (27, 3, 0),
    "count": (8, 21, 1),
    "position": (3, 26, 1),
    "color": (5, 25, 0),
    "posters": (30, 114, 3),
    "celebrity": (16, 97, 57),
    "scene": (116, 83, 1),
    "landmark": (59, 138, 3),
    "artwork": (56, 125, 19),
    "OCR": (8, 11, 1),
    "commonsense_reasoning": (20, 42, 8),
    "numerical_calculation": (2, 18, 0),
    "text_translation": (0, 19, 1),
    "code_reasoning": (0, 20, 0),
}
PUBLISHED = {"perception": 963.61, "cognition": 249.64}  # MME's leaderboard, and what its calculation.py prints


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def tool(tmp_path):
    """Two tasks of two pictures as eval_tool has them."""
    for task in ("existence", "code_reasoning"):
        rows = [
            (f"{picture}.jpg", f"Is there a {thing}?{' ' * spaces}{HINT}", answer)
            for picture, spaces in (("1", 1), ("2", 2))
            for thing, answer in (("cat", "Yes"), ("dog", "No"))
        ]
        lines(tmp_path / "tool" / f"{task}.txt", *rows)
    return tmp_path / "tool"


@pytest.fixture
def release(tmp_path, tool):
    """The same as the release has them: pictures beside the texts, or both in folders of their own."""
    root = tmp_path / "release"
    for task in ("existence", "code_reasoning"):
        folder = root / "MME_Benchmark" / task
        texts, pictures = (folder, folder) if task == "existence" else (folder / mme.TEXTS, folder / "images")
        for line in (tool / f"{task}.txt").read_text().splitlines():
            image, *rest = line.split("\t")
            texts.mkdir(parents=True, exist_ok=True)
            pictures.mkdir(parents=True, exist_ok=True)
            with (texts / image.replace(".jpg", ".txt")).open("a") as file:
                file.write("\t".join(rest) + "\r\n")
            (pictures / image).write_bytes(f"{task} {image}".encode())
    return root


def answered(folder, path, answer):
    """A copy of eval_tool's folder, filled in: `answer` of (task, picture, question, gold)."""
    for file in folder.glob("*.txt"):
        rows = [line.split("\t") for line in file.read_text().splitlines()]
        lines(path / file.name, *((*row, answer(file.stem, *row)) for row in rows))
    return path


def test_lavins_published_score(tmp_path):
    """calculation.py on the answers that come with it: perception 963.61, cognition 249.64."""
    for task, outcomes in LAVIN.items():
        rows = [
            (f"{right}_{number}.jpg", f"{question}? {HINT}", "Yes", "yes, it is" if question <= right else "no")
            for right, count in zip((2, 1, 0), outcomes, strict=True)
            for number in range(count)
            for question in (1, 2)
        ]
        lines(tmp_path / "predictions" / f"{task}.txt", *rows)
        lines(tmp_path / "references" / f"{task}.txt", *(row[:3] for row in rows))
    scores = mme.score(tmp_path / "predictions", tmp_path / "references", options={})
    assert {name: round(scores.metrics[name], 2) for name in PUBLISHED} == PUBLISHED
    assert scores.metrics["total"] == pytest.approx(sum(scores.metrics[name] for name in PUBLISHED))
    assert (scores.score, scores.size) == (scores.metrics["perception"], 2374)
    found = {task: round(group.score, 2) for task, group in scores.groups["task"].items()}
    assert (found["existence"], found["posters"], found["celebrity"], found["OCR"]) == (185.0, 79.59, 47.35, 107.5)
    assert scores.groups["accuracy plus"]["posters"] == mme.Group(score=100 * 30 / 147, num_samples=147)
    for name, (low, high) in scores.intervals().items():
        assert low < scores.metrics[name] < high


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("YES, it is", "yes"),
        (" yes", "yes"),
        ("I know", ""),
        ("know", "no"),  # official: anywhere in the first four characters
        ("nyes", "yes"),
        ("noye", "no"),
        ("the answer is yes", ""),
        ("  no", "no"),
        ("   no", ""),
        ("y", ""),
        ("", ""),
    ],
)
def test_what_counts_as_yes_and_no(answer, label):
    assert mme.parse(answer) == label


def test_questions_are_the_same_from_every_file(tool, release, tmp_path):
    expected = [
        (f"{task}/{picture}/{number}", task, answer)
        for task in ("existence", "code_reasoning")
        for picture in ("1", "2")
        for number, answer in ((1, "yes"), (2, "no"))
    ]
    archive = tmp_path / "release.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in release.rglob("*.*"):
            file.write(path, path.relative_to(release.parent))
    rows = [
        {
            "question_id": f"{one.task}/{one.image}",
            "category": one.task,
            "question": one.text,
            "answer": one.answer.capitalize(),
        }
        for one in mme.load_questions(tool)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for path in (tool, release, release / "MME_Benchmark", archive, tmp_path / "rows.json"):
        found = mme.load_questions(path)
        assert [(one.id, one.task, one.answer) for one in found] == expected, path


def test_examples_have_llavas_prompt_and_their_pictures(tool, release, tmp_path):
    found = mme.examples(release, options={})
    assert [example.prompt for example in found[:3]] == [
        "Is there a cat?\nAnswer the question using a single word or phrase.",
        "Is there a dog?\nAnswer the question using a single word or phrase.",
        "Is there a cat?\nAnswer the question using a single word or phrase.",
    ]
    assert [example.references for example in found[:2]] == [("Yes",), ("No",)]
    assert found[0].images == (release / "MME_Benchmark/existence/1.jpg",)
    assert found[4].images == (release / "MME_Benchmark/code_reasoning/images/1.jpg",)
    assert mme.examples(tool, release / "MME_Benchmark", options={}) == found
    archive = tmp_path / "release.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in release.rglob("*.*"):
            file.write(path, path.relative_to(release))
    assert mme.examples(archive, options={})[4].images == (b"code_reasoning 1.jpg",)
    with pytest.raises(ValueError, match=r"8 of 8 questions have no picture, the first is 1.jpg of existence"):
        mme.examples(tool, options={})


def test_parquet_as_lmms_eval_publishes_it(tool, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "question_id": f"{one.task}/{one.image}",
            "image": {"bytes": one.id.encode(), "path": one.image},
            "question": one.text,
            "answer": one.answer.capitalize(),
            "category": one.task,
        }
        for one in mme.load_questions(tool)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    for number, part in enumerate((rows[:3], rows[3:])):  # shards may divide a picture's questions
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"test-0000{number}-of-00002.parquet")
    found = mme.examples(folder, options={})
    assert [example.images for example in found] == [(example.id.encode(),) for example in found]
    assert [example.id for example in found] == [one.id for one in mme.load_questions(tool)]


def test_answers_in_every_form_give_the_same_scores(tool, tmp_path):
    """Ours, eval_tool's folder, LLaVA's file and the folder that LLaVA makes of it, whose pictures end in .txt."""
    questions = mme.load_questions(tool)
    said = {one.id: "Yes" if one.image == "1.jpg" else one.answer for one in questions}
    said["existence/2/2"] = "cannot tell"
    ours = tmp_path / "ours.jsonl"
    ours.write_text("".join(json.dumps({"id": name, "answer": f"{text}\n"}) + "\n" for name, text in said.items()))
    by_text = {(one.task, one.image, one.text): said[one.id] for one in questions}
    folder = answered(tool, tmp_path / "folder", lambda task, image, text, _: by_text[task, image, text])
    llava = tmp_path / "llava.jsonl"
    rows = [
        {
            "question_id": f"{task}/{image}",
            "prompt": f"{text.replace(HINT, '').strip()}\n{mme.INSTRUCTION}",
            "text": f" {answer}",
            "answer_id": "x",
        }
        for (task, image, text), answer in by_text.items()
    ]
    llava.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    converted = tmp_path / "converted"
    for file in folder.iterdir():
        lines(
            converted / file.name,
            *(line.replace(".jpg", ".txt").split("\t") for line in file.read_text().splitlines()[::-1]),
        )
    for path in (ours, folder, llava, converted):
        scores = mme.score(path, tool, options={})
        # Of four pictures: one whole in each task but existence, whose second has one right answer.
        assert scores.metrics == {"perception": 50.0, "cognition": 75.0 + 50.0, "total": 175.0}, path
        assert (scores.correct, scores.size, scores.counts["unparsed"]) == (5, 8, 1)
        assert [sample.parsed for sample in scores.samples[:4]] == ["yes", "yes", "yes", ""]
        assert any("the sums are of the other tasks" in note for note in scores.notes)


def test_a_line_break_in_an_answer_is_deleted_as_the_official_file_wants_it(tool, tmp_path):
    path = tmp_path / "ours.jsonl"
    rows = [{"id": one.id, "answer": f"\n{one.answer[0]}\n{one.answer[1:]}"} for one in mme.load_questions(tool)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert mme.score(path, tool, options={}).metrics["total"] == 400.0


def test_some_of_the_questions(tool, tmp_path):
    path = tmp_path / "ours.jsonl"
    path.write_text(json.dumps({"id": "code_reasoning/1/1", "answer": "yes"}) + "\n")
    scores = mme.score(path, tool, options={}, only={"code_reasoning/1/1"})
    assert (scores.metric, scores.metrics) == ("cognition", {"cognition": 200.0, "total": 200.0})


def test_answers_to_other_questions(tool, tmp_path):
    other = answered(tool, tmp_path / "other", lambda *row: "yes")
    (other / "existence.txt").write_text((other / "existence.txt").read_text().replace("cat", "bird"))
    with pytest.raises(EvaluationError, match=r"2 of 8 samples have no prediction \(existence/1/1, existence/2/1\)"):
        mme.score(other, tool, options={})
    (other / "existence.txt").unlink()
    with pytest.raises(EvaluationError, match=r"it lacks existence.txt"):
        mme.score(other, tool, options={})
    with pytest.raises(ValueError, match=r"existence.txt line 1 has 3 columns, not 4"):
        mme.score(tool, tool, options={})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("1.jpg", "a", "Yes")], r"every picture has two questions, but 1 of 1 do not, first existence/1"),
        ([("1.jpg", "a", "Yes"), ("1.jpg", "b", "maybe")], r"picture 1.jpg: the answer is 'maybe', not yes or no"),
        ([("1.jpg", "a")], r"existence.txt line 1 has 2 columns, not 3 or 4"),
        ([], r"there is none"),
    ],
)
def test_files_that_are_none_of_its(tmp_path, rows, message):
    lines(tmp_path / "existence.txt", *rows)
    with pytest.raises(ValueError, match=message):
        mme.load_questions(tmp_path)


def test_rows_and_folders_that_are_none_of_its(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"question_id": "a/1.jpg", "question": "?", "answer": "Yes"}]))
    with pytest.raises(ValueError, match=r"row 0: a question of MME has question_id, category, question and answer"):
        mme.load_questions(tmp_path / "x.json")
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no folder has a task's name, such as existence"):
        mme.load_questions(tmp_path / "folder")
