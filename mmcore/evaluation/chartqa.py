"""ChartQA: questions about charts, written by people or made of captions; relaxed accuracy.

Read are the official test_human.json and test_augmented.json, each by itself or both of them as their folder, Hugging
Face's tables (lmms-lab/ChartQA, HuggingFaceM4/ChartQA) and VLMEvalKit's. The official rows have no ids: a question is
known by its number in the file, from 0; of the folder the augmented ones follow those of people.

The rule is google-research/pix2struct's, pix2struct/metrics.py at commit 945f27e, after Methani et al. (2020), which
the benchmark's paper names and everybody uses: numbers are right within 5 % of the reference, percentages taken as
numbers ("5%" is .05, and wrong where "5" is right); all else is right if it is the same but for capitals, and so is
whatever is compared with zero. White space at the ends does not count.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from mmcore.evaluation.predictions import load_predictions
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.short_answers import (
    ANSWER_FORMATS,
    Question,
    ask,
    by_id,
    file_name,
    judged,
    open_rows,
    read_questions,
    with_parts,
)
from mmcore.evaluation.tables import Row
from mmcore.evaluation.task import Example, Options

METRIC = "relaxed_accuracy"
SCALES = {METRIC: "percent", "human": "percent", "augmented": "percent"}
OPTIONS: dict[str, tuple[str, ...]] = {}

TOLERANCE = 0.05


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`."""
    return ask(data, images or (data if data.is_dir() else None), _load(data), names=_names)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; scores are percentages."""
    questions = by_id(_load(references), references, only)
    found = load_predictions(predictions, list(questions), references, formats=ANSWER_FORMATS)
    scores = judged(
        questions,
        found,
        lambda answer, question: (float(any(is_right(answer, right) for right in question.answers)), ""),
        metric=METRIC,
        scales=SCALES,
        scorer={"rule": f"relaxed accuracy, {TOLERANCE:.0%}"},
        is_right_or_wrong=True,
    )
    return with_parts(
        scores,
        {"human": lambda sample: sample.group == "human", "augmented": lambda sample: sample.group == "augmented"},
    )


def is_right(answer: str, right: str) -> bool:
    """Whether an answer is right by the relaxed rule."""
    answer = answer.strip()
    given, wanted = _number(answer), _number(right)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= TOLERANCE
    return answer.lower() == right.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _load(path: Path) -> list[Question]:
    files = [path]
    if path.is_dir():
        files = [*sorted(path.glob("*_human.json")), *sorted(path.glob("*_augmented.json"))] or [path]
    rows = chain.from_iterable(_of_split(file) for file in files)
    kinds = {"split": _split}
    return list(read_questions(rows, kinds, lambda row, number: row.get("index", row.get("question_id", number))))


def _of_split(path: Path) -> Iterator[Row]:
    """Rows of a file, with the split that the file's name tells."""
    split = next((split for split in ("human", "augmented") if split in path.stem), None)
    for where, row in open_rows(path)[1]:
        yield where, {"split": split, **row} if split and isinstance(row, dict) else row


def _split(row: Mapping[str, Any]) -> str | None:
    if "human_or_machine" in row:
        return "augmented" if row["human_or_machine"] in (1, "machine") else "human"
    name = str(row.get("split") or row.get("type"))
    return next((split for split in ("human", "augmented") if split in name), None)


def _names(question: Question) -> list[str]:
    name = file_name(question)
    return [name, f"png/{name}"]
