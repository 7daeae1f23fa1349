"""DocVQA (single page): questions about scanned documents, scored by ANLS.

Read are val_v1.0.json and val_v1.0_withQT.json ({"data": [...]}, the latter with kinds of questions), Hugging Face's
table (lmms-lab/DocVQA) and VLMEvalKit's. The server's results, [{"questionId", "answer"}], need every question.
"""

from collections.abc import Collection
from pathlib import Path

from mmcore.evaluation.metrics.anls import THRESHOLD, anls
from mmcore.evaluation.predictions import load_predictions
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.short_answers import (
    ANSWER_FORMATS,
    Kinds,
    Question,
    ask,
    by_id,
    file_name,
    judged,
    number,
    open_rows,
    read_questions,
    submit,
)
from mmcore.evaluation.task import Example, Options

METRIC = "anls"
SCALES = {METRIC: "0 to 1"}
OPTIONS: dict[str, tuple[str, ...]] = {}

KINDS: Kinds = {"question type": lambda row: row.get("question_types")}


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; answers need not be there."""
    return ask(data, images, load(data, KINDS), names=names)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    return score_anls(predictions, references, KINDS, only)


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """For the RRC server (rrc.cvc.uab.es): [{"questionId", "answer"}]."""
    submit(
        predictions,
        references,
        load(references, KINDS),
        output,
        lambda question, answer: {"questionId": number(question.id), "answer": answer},
    )


def load(path: Path, kinds: Kinds) -> list[Question]:
    """Questions of a file.

    Raises:
        ValueError: not in the format.
    """
    return list(read_questions(open_rows(path)[1], kinds))


def names(question: Question) -> list[str]:
    """Where a picture may lie: by the name that the file gives it, or without its folder."""
    name = file_name(question)
    return [name, Path(name).name]


def score_anls(predictions: Path, references: Path, kinds: Kinds, only: Collection[str] | None) -> Scores:
    """Scores by ANLS, in groups by `kinds`."""
    questions = by_id(load(references, kinds), references, only)
    found = load_predictions(predictions, list(questions), references, formats=ANSWER_FORMATS)
    return judged(
        questions,
        found,
        lambda answer, question: (anls(answer, question.answers), ""),
        metric=METRIC,
        scales=SCALES,
        scale=1.0,
        scorer={"rule": f"ANLS, threshold {THRESHOLD}"},
    )
