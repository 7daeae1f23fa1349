"""VizWiz-VQA: questions of blind people about pictures they took, many of them unanswerable; soft accuracy.

Read are the official val.json and test.json (a list; the picture is the id), LLaVA's files of questions, Hugging Face's
table (lmms-lab/VizWiz-VQA) and VQA's form. The official rule is the VizWiz API's; VQA's is mode=vqa (see
`mmcore.evaluation.metrics.vqa`). The API also scores a separate task, how sure a model is that a question can be
answered; that is not done here.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore.evaluation import vqav2
from mmcore.evaluation.metrics.vqa import m4c
from mmcore.evaluation.predictions import load_predictions, read_predictions
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.short_answers import ANSWER_FORMATS, SHORT_ANSWER, Question, ask, file_name, submit
from mmcore.evaluation.task import Example, Options

METRIC = vqav2.METRIC
SCALES = vqav2.SCALES
OPTIONS = vqav2.OPTIONS

# LLaVA-1.5's words (arXiv 2310.03744, appendix).
SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER

# Of the official results, which have the picture alone, and of all others.
FORMATS = (*ANSWER_FORMATS, ("image", "answer"))


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; answers need not be there."""
    return ask(data, images, vqav2.load(data, "questions", _identify), SUFFIX)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; the score is a percentage."""
    questions = _as_predicted(vqav2.load_answered(references, only, _identify).values(), predictions)
    found = load_predictions(predictions, list(questions), references, formats=FORMATS)
    return vqav2.soft(questions, found, options, official="vizwiz")


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """For EvalAI: [{"image", "answer"}]; with mode=m4c normalised, as LLaVA's scripts/convert_vizwiz_for_submission.py
    does it."""
    tidy = m4c if options["mode"] == "m4c" else str
    submit(
        predictions,
        references,
        list(_as_predicted(vqav2.load(references, "", _identify), predictions).values()),
        output,
        lambda question, answer: {
            "image": file_name(question) or f"{question.id.removesuffix('.jpg')}.jpg",
            "answer": tidy(answer),
        },
        FORMATS,
    )


def _identify(row: Mapping[str, Any], _: int) -> Any:
    return row.get("index", row.get("question_id", row.get("image")))


def _as_predicted(questions: Iterable[Question], predictions: Path) -> dict[str, Question]:
    """Questions by the ids that the predictions have: the picture's name with its suffix, or without."""
    first = next((name for name, _ in read_predictions(predictions, FORMATS)), "")
    suffix = ".jpg" if first.endswith(".jpg") else ""
    named = [
        replace(question, id=question.id.removesuffix(".jpg") + suffix)
        if question.id.startswith("VizWiz_")
        else question
        for question in questions
    ]
    return {question.id: question for question in named}
