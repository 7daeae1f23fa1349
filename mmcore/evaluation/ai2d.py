"""AI2D: questions of multiple choice on diagrams of school books.

There is no official scorer of answers in words. The rule is that of lmms-eval, which LLaVA-NeXT and those after it
report (lmms_eval/tasks/ai2d at commit 75571cf): a letter and a full stop at the beginning of the answer, or a letter
that is all of it, punctuation and case aside (see `mmcore.evaluation.metrics.choices.leading_letter`). Accuracy, in
percent.

Questions are read from the Parquet files of lmms-lab/ai2d, from VLMEvalKit's AI2D_TEST.tsv, and from the unpacked
ai2d-all.zip of the Allen Institute: a folder with `questions` and `images`. Of that the pictures that
ai2d_test_ids.csv names, in the folder or beside it, are the test set, and all count where it is not there. Questions
on letters that replace a diagram's words are shown on `abc_images` where there is such a folder.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmcore.evaluation.choice_questions import (
    LETTERS,
    Question,
    as_examples,
    describe,
    read_shards,
    table_questions,
    unique,
)
from mmcore.evaluation.metrics.choices import leading_letter, load_answers, score_answers
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.task import Example, Options, read_json, sample_id

METRIC = "accuracy"
SCALES = {METRIC: "percent"}
OPTIONS: dict[str, tuple[str, ...]] = {}

_TESTS = "ai2d_test_ids.csv"


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; asked as LLaVA does."""
    root = images or data
    if (data / "questions").is_dir():
        return as_examples(data, root.parent if root.name == "images" else root, load_questions(data))
    return as_examples(data, images, load_questions(data))


def load_questions(path: Path, *, pictures: bool = True) -> list[Question]:
    """Questions of the test set; arguments as of `table_questions`.

    Raises:
        ValueError: not this benchmark's files.
    """
    folder = path / "questions"
    if not folder.is_dir():
        return table_questions(read_shards(path, "references", "test"), pictures=pictures)
    categories = read_json(path / "categories.json", "categories") if (path / "categories.json").is_file() else {}
    tests = next((file for file in (path / _TESTS, path.parent / _TESTS) if file.is_file()), None)
    names = set(tests.read_text().split()) if tests else None
    found = []
    for file in sorted(folder.glob("*.json"), key=lambda file: (len(file.name), file.name)):
        content = read_json(file, "questions")
        image = content.get("imageName", file.stem) if isinstance(content, dict) else file.stem
        if names is None or image.removesuffix(".png") in names:
            category = categories.get(image)
            entries = content.get("questions") if isinstance(content, dict) else None
            if not isinstance(entries, dict):
                raise ValueError(f"{file} has no questions: {describe(content)}")
            found += [_question(text, row, path, image, category, str(file)) for text, row in entries.items()]
    return unique(found)


def _question(text: str, row: Any, path: Path, image: str, category: str | None, where: str) -> Question:
    if not isinstance(row, dict) or not {"answerTexts", "correctAnswer", "questionId"} <= row.keys():
        raise ValueError(f"{where}: {text!r:.80} has no answerTexts, correctAnswer and questionId: {describe(row)}")
    has_letters = row.get("abcLabel") and (path / "abc_images" / image).is_file()
    return Question(
        id=sample_id(row["questionId"], where),
        question=text,
        choices=tuple(map(str, row["answerTexts"])),
        answer=LETTERS[int(row["correctAnswer"])],
        pictures=(f"{'abc_images' if has_letters else 'images'}/{image}",),
        groups={"category": (category,)} if category else {},
    )


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    questions = [q for q in load_questions(references, pictures=False) if only is None or q.id in only]
    return score_answers(
        questions,
        load_answers(predictions, questions, references),
        lambda answer, question: leading_letter(answer, question.letters),
        scorer={"rule": "lmms-eval ai2d at 75571cf"},
    )
