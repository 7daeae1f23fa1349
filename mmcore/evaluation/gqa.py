"""GQA: questions made of scene graphs, one right answer each, compared as text.

Read are the official questions (testdev_balanced_questions.json: an object of ids to questions), Hugging Face's table
of instructions (lmms-lab/GQA; the pictures are in a table of their own, which --images may name) and VLMEvalKit's.

The rule is the official eval.py's, read in PKU-YuanGroup/Video-LLaVA, videollava/eval/eval_gqa.py at commit 984e65b:
of the balanced questions, those whose prediction is the answer, letter by letter. What a model said is first made a
prediction as by LLaVA's scripts/convert_gqa_for_eval.py at commit c121f04: dots at its end are dropped, and capitals.
The official format, [{"questionId", "prediction"}], is what that script writes, so its predictions count as they are.

Of the official metrics those are left out that take more than answers to these questions: consistency (the other
questions of val_all), validity and plausibility (choices.json), grounding, and distribution, of which less is better.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore.evaluation.predictions import load_predictions, read_predictions
from mmcore.evaluation.scores import Scores
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
    with_parts,
)
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options

METRIC = "accuracy"
SCALES = {METRIC: "percent", "binary": "percent", "open": "percent"}
OPTIONS: dict[str, tuple[str, ...]] = {}

OFFICIAL = ("questionId", "prediction")

_SEMANTIC = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}
# Steps that do not count as reasoning: the last one, that asks.
_ASKING = ("exist", "query: name", "choose name")

_KINDS: Kinds = {
    "structural type": lambda row: _types(row).get("structural"),
    "semantic type": lambda row: _SEMANTIC.get(str(_types(row).get("semantic")), _types(row).get("semantic")),
    "steps": lambda row: _num_steps(row.get("semantic")),
    "words": lambda row: str(len(str(row.get("question", "")).split())),
}


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; answers need not be there."""
    questions = [question for is_balanced, question in _load(data) if is_balanced]
    if images and images.suffix == ".parquet":
        pictures = {question.id: question.image for question in read_questions(open_rows(images)[1], {})}
        questions = [replace(question, image=pictures.get(question.image_id)) for question in questions]
        images = None
    return ask(data, images, questions, names=_names)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; scores are percentages."""
    rows = list(_load(references))
    questions = by_id([question for is_balanced, question in rows if is_balanced], references, only)
    formats = (OFFICIAL, *ANSWER_FORMATS)
    given = {name for name, _ in read_predictions(predictions, formats)}
    others = [question.id for is_balanced, question in rows if not is_balanced and question.id in given]
    found = load_predictions(predictions, [*questions, *others], references, formats=formats)
    first = next((row for _, row in read_rows(predictions, "predictions")), None)
    is_final = isinstance(first, dict) and first.keys() >= set(OFFICIAL)

    def judge(answer: str, question: Question) -> tuple[float, str]:
        parsed = answer if is_final else answer.strip().rstrip(".").lower()
        return float(parsed == question.answers[0]), parsed

    scores = judged(
        questions,
        replace(
            found,
            answers={name: found.answers[name] for name in questions},
            counts={**found.counts, "not balanced": len(others)},
        ),
        judge,
        metric=METRIC,
        scales=SCALES,
        scorer={"rule": "as written" if is_final else "final dots dropped, lower case"},
        is_right_or_wrong=True,
    )
    return with_parts(
        scores,
        {
            "binary": lambda sample: sample.group not in ("query", ""),
            "open": lambda sample: sample.group == "query",
        },
    )


def _load(path: Path) -> Iterator[tuple[bool, Question]]:
    """Questions, and whether they count: files of all questions have others too."""
    for where, row in open_rows(path)[1]:
        question = next(read_questions(iter([(where, row)]), _KINDS))
        yield row.get("isBalanced", True) is not False, question


def _types(row: Mapping[str, Any]) -> Mapping[str, Any]:
    types = row.get("types")
    return types if isinstance(types, dict) else {}


def _num_steps(semantic: Any) -> str | None:
    if not isinstance(semantic, list):
        return None
    steps = [f"{step.get('operation')}: {step.get('argument')}" for step in semantic]
    return str(sum(not any(asking in step for asking in _ASKING) for step in steps))


def _names(question: Question) -> list[str]:
    return [file_name(question) or (question.image_id and f"{question.image_id}.jpg")]
