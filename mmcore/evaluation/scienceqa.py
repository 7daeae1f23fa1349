"""ScienceQA: school questions of multiple choice, half of them with a picture.

The letter in an answer is found as LLaVA finds it (see `mmcore.evaluation.metrics.choices.llava_letter`), and what has
none is wrong, as is a question without an answer. Metrics, in percent: accuracy, and accuracy_img, that of the
questions with a picture, which LLaVA and those after it report. Groups are those of the official
tools/evaluate_acc.py (lupantech/ScienceQA at commit 2cbf831): subject, what the question comes with (TXT, a hint; IMG,
a picture; NO, neither), grade, topic.

Questions are read from the official problems.json with pid_splits.json beside it (a folder with both, or the first),
from the Parquet files of derek-thomas/ScienceQA and lmms-lab/ScienceQA, which have no ids (the row's number counts,
from 0), and from VLMEvalKit's tables. Predictions may also be an official result file, whose `results` are numbers of
choices, below 0 for none; they count as they are.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore.evaluation.choice_questions import (
    LETTERS,
    Question,
    as_examples,
    cells,
    describe,
    named,
    read_shards,
    table_questions,
    unique,
)
from mmcore.evaluation.confidence import mean
from mmcore.evaluation.metrics.choices import llava_letter, load_answers, score_answers
from mmcore.evaluation.predictions import Predictions, match_answers
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options, read_json, sample_id

METRIC = "accuracy"
SCALES = {METRIC: "percent", "accuracy_img": "percent"}
OPTIONS = {"split": ("test", "val", "train", "minitest", "minival")}

_SHARDS = {"val": "validation"}  # how the Parquet files call a split


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`. `images` is the official folder, that of the split in it, or that above it.

    The prompt is that of LLaVA-1.5's llava_test_CQM-A.json: the hint as context where there is one.
    """
    questions, split = load_questions(data, options), options["split"].removeprefix("mini")
    names = [next((name for name in question.pictures if isinstance(name, str)), None) for question in questions]
    inside = [name and f"{split}/{name}" for name in names]
    found = named(data, images, inside, names, [name and f"images/{name}" for name in inside])
    return as_examples(
        data,
        images,
        [replace(q, pictures=(name,)) if name else q for q, name in zip(questions, found, strict=True)],
    )


def load_questions(path: Path, options: Options) -> list[Question]:
    """Questions of the split, in the official order.

    Raises:
        ValueError: not this benchmark's files.
    """
    split = options["split"]
    file = path / "problems.json" if path.is_dir() else path
    if file.suffix == ".json":
        problems = read_json(file, "references") if file.is_file() or not path.is_dir() else None
        if isinstance(problems, dict):
            return _problems(file, problems, split)
    rows = list(read_shards(path, "references", _SHARDS.get(split, split)))
    if rows and isinstance(rows[0][1], dict) and "choices" in rows[0][1]:
        return unique([_question(str(number), row, where) for number, (where, row) in enumerate(rows)])
    return table_questions(iter(rows))


def _problems(file: Path, problems: Mapping[str, Any], split: str) -> list[Question]:
    splits = file.with_name("pid_splits.json")
    if splits.is_file():
        ids = read_json(splits, "splits")[split]
        absent = [name for name in ids if name not in problems]
        if absent:
            raise ValueError(
                f"{file} lacks {len(absent)} of {len(ids)} questions of {splits}, the first is {absent[0]}"
            )
    else:
        ids = [name for name, row in problems.items() if isinstance(row, dict) and row.get("split") == split]
    if not ids:
        raise ValueError(f"{file} has no questions of the split {split}, and there is no pid_splits.json beside it")
    return [_question(sample_id(name, str(file)), problems[name], f"{file}: {name}") for name in ids]


def _question(name: str, row: Any, where: str) -> Question:
    try:
        hint, image = row.get("hint") or "", row["image"]
        answer = row["answer"]
        # What a choice beyond the letters would be is nothing that LLaVA's rule could read.
        letter = LETTERS[answer] if isinstance(answer, int) else ""
        grade = int(str(row["grade"]).removeprefix("grade")) if row.get("grade") else 0
        question, choices = row["question"], tuple(map(str, row["choices"]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where} is no problem of ScienceQA (question, choices, answer, ...): {describe(row)}"
        ) from None
    comes_with = (*(["TXT"] if hint else []), *(["IMG"] if image else []), *(["NO"] if not hint and not image else []))
    return Question(
        id=name,
        question=f"Context: {hint}\n{question}" if hint else question,
        choices=choices,
        answer=letter,
        pictures=(f"{name}/{image}",) if isinstance(image, str) else cells(image),
        groups={
            "subject": (row["subject"],) if row.get("subject") else (),
            "comes with": comes_with,
            "grade": ("G1-6" if grade <= 6 else "G7-12",) if grade else (),
            "topic": (row["topic"],) if row.get("topic") else (),
        },
    )


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    questions = [q for q in load_questions(references, options) if only is None or q.id in only]
    results = _results(predictions, questions, references)
    found = results or load_answers(predictions, questions, references, missing="empty")

    def read(answer: str, question: Question) -> str:
        return answer if results else llava_letter(answer, question.letters)

    scores = score_answers(
        questions, found, read, scorer={"rule": "LLaVA eval_science_qa.py at c121f04", "split": options["split"]}
    )
    rights = [
        sample.score
        for sample, question in zip(scores.samples, questions, strict=True)
        if "IMG" in question.groups.get("comes with", ())
    ]
    if not rights:
        return scores
    return replace(
        scores,
        metrics={**scores.metrics, "accuracy_img": sum(rights) / len(rights) * 100},
        scales=SCALES,
        statistics={**scores.statistics, "accuracy_img": mean(rights)},
    )


def _results(path: Path, questions: list[Question], references: Path) -> Predictions | None:
    """Letters of an official result file, None if it is none."""
    row = next((row for _, row in read_rows(path, "predictions")), None)
    results = row.get("results") if isinstance(row, dict) else None
    if not isinstance(results, dict):
        return None
    letters = {}
    for name, number in results.items():
        if not isinstance(number, int) or isinstance(number, bool) or number >= len(LETTERS):
            raise ValueError(f"{path}: results are numbers of choices, but that of {name} is {number!r:.80}")
        letters[name] = LETTERS[number] if number >= 0 else ""
    return match_answers(path, letters, [question.id for question in questions], references, "empty")
