"""OCRBench: 1000 questions about words in pictures; right is what contains the answer. The score is their number.

Read are the official OCRBench.json (its `id` is not unique: a question is known by its number, from 0), Hugging Face's
table (echo840/OCRBench) and VLMEvalKit's. Predictions may also be the official script's own results, which are the same
rows in the same order with `predict`.

The rule is that of Yuliang-Liu/MultimodalOCR, OCRBench/example.py at commit 794c36d: one of the answers is contained in
the prediction, in lower case and with line breaks as spaces; of formulas (HME100k) without spaces, and capitals count.
A question without a prediction is wrong. The prompt is that of its script for LLaVA-1.5 (OCRBench/scripts/LLaVA1_5.py).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore.evaluation.confidence import mean
from mmcore.evaluation.predictions import Predictions, load_predictions, match_answers
from mmcore.evaluation.scores import EvaluationError, Group, Scores
from mmcore.evaluation.short_answers import (
    ANSWER_FORMATS,
    Kinds,
    Question,
    ask,
    by_id,
    file_name,
    judged,
    open_rows,
    read_questions,
)
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options

METRIC = "final_score"
SCALES = {METRIC: "right answers, of 1000", "accuracy": "percent"}
OPTIONS: dict[str, tuple[str, ...]] = {}

NUM_QUESTIONS = 1000
FORMULAS = "Handwritten Mathematical Expression Recognition"

_KINDS: Kinds = {
    "category": lambda row: _category(row),
    "task": lambda row: _task(_category(row)),
    "dataset": lambda row: row.get("dataset_name") or row.get("dataset"),
}


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`."""
    return ask(data, images, _load(data), names=_names)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; the score is the number of right answers."""
    rows = _load(references)
    questions = by_id(rows, references, only)
    found = _load_answers(predictions, rows, list(questions), references)
    scores = judged(
        questions,
        found,
        lambda answer, question: (float(is_right(answer, question)), ""),
        metric="accuracy",
        scales=SCALES,
        scorer={"rule": "the answer is contained"},
        is_right_or_wrong=True,
    )
    rights = [sample.score for sample in scores.samples]
    note = f"OCRBench has {NUM_QUESTIONS} questions; these are {len(rights)}, and so many can be right"
    return replace(
        scores,
        metric=METRIC,
        metrics={METRIC: sum(rights), **scores.metrics},
        statistics={METRIC: mean(rights, len(rights)), **scores.statistics},
        groups={
            kind: {
                name: Group(score=float(round(group.score * group.num_samples / 100)), num_samples=group.num_samples)
                for name, group in parts.items()
            }
            for kind, parts in scores.groups.items()
        },
        notes=(*scores.notes, *([note] if len(rights) != NUM_QUESTIONS else [])),
    )


def is_right(answer: str, question: Question) -> bool:
    """Whether an answer contains one that is right."""
    is_formula = question.groups.get("dataset", question.groups.get("category")) in (("HME100k",), (FORMULAS,))

    def tidy(text: str) -> str:
        if is_formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.lower().strip().replace("\n", " ")

    return any(tidy(right) in tidy(answer) for right in question.answers)


def _load(path: Path) -> list[Question]:
    return list(read_questions(open_rows(path)[1], _KINDS, lambda row, number: row.get("index", number)))


def _load_answers(
    predictions: Path, questions: Sequence[Question], names: Sequence[str], references: Path
) -> Predictions:
    rows = [row for _, row in read_rows(predictions, "predictions")]
    if not (rows and isinstance(rows[0], dict) and {"question", "dataset_name"} <= rows[0].keys()):
        return load_predictions(predictions, names, references, formats=ANSWER_FORMATS, missing="empty")
    if [row.get("question") for row in rows] != [question.text for question in questions]:
        raise EvaluationError(
            f"{predictions} has {len(rows)} rows of the official script, which are not the {len(questions)} questions "
            f"of {references} in their order: a score would be meaningless"
        )
    answers = {
        question.id: str(row["predict"])
        for question, row in zip(questions, rows, strict=True)
        if "predict" in row and question.id in names
    }
    return match_answers(predictions, answers, names, references, missing="empty")


def _category(row: Mapping[str, Any]) -> str | None:
    return row.get("type") or row.get("question_type") or row.get("category")


def _task(category: str | None) -> str | None:
    """Six categories are one task, whose score is told by itself."""
    is_recognition = category is not None and category.endswith("Recognition") and category != FORMULAS
    return "Text Recognition" if is_recognition else category


def _names(question: Question) -> list[str]:
    name = file_name(question)
    return [name, f"OCRBench_Images/{name}"]
