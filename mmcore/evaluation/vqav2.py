"""VQAv2: short answers to questions about COCO's pictures, each asked of ten people; soft accuracy.

The official form are two files, read together whichever of them is named: the annotations with the answers
(v2_mscoco_val2014_annotations.json) and the questions (v2_OpenEnded_mscoco_val2014_questions.json); or one file that
has both lists. Hugging Face's tables (lmms-lab/VQAv2) and LLaVA's files of questions are read too. Every question
needs its answer, as in the official reader (GT-Vision-Lab/VQA, vqa.py's loadRes).

The rule is `mmcore.evaluation.metrics.vqa`'s, by the option `mode`. LLaVA's script for the server
(scripts/convert_vqav2_for_submission.py) normalises answers by `m4c` first; so does `submission` with mode=m4c.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mmcore.evaluation.metrics.vqa import MODES, Rule, accuracy, m4c
from mmcore.evaluation.predictions import Predictions, load_predictions
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.short_answers import (
    ANSWER_FORMATS,
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

METRIC = "accuracy"
SCALES = {METRIC: "percent"}
OPTIONS = {"mode": MODES}

_SPLIT = re.compile(r"(?:train|val|test)(?:-dev)?20\d\d")
_COCO_NAME = re.compile(r"COCO_(\w+)_(\d{12}\.jpg)")


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; answers need not be there. Pictures lie in a folder of their split, or not."""
    return ask(data, images, load(data, "questions"), names=coco_names)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; the score is a percentage."""
    questions = load_answered(references, only)
    found = load_predictions(predictions, list(questions), references, formats=ANSWER_FORMATS)
    return soft(questions, found, options, official="vqa")


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """For EvalAI: [{"question_id", "answer"}]. Questions without a prediction get an empty answer, and are counted.

    The server takes answers to the whole test set, of which test-dev is a part.
    """
    tidy = m4c if options["mode"] == "m4c" else str
    submit(
        predictions,
        references,
        load(references),
        output,
        lambda question, answer: {"question_id": number(question.id), "answer": tidy(answer)},
        missing="empty",
    )


def soft(questions: Mapping[str, Question], found: Predictions, options: Options, official: Rule) -> Scores:
    """Scores by soft accuracy.

    Args:
        questions: by id, each with its answers.
        official: the benchmark's own rule.
    """
    rule = cast(Rule, official if options["mode"] == "official" else options["mode"])
    scores = judged(
        questions,
        found,
        lambda answer, question: accuracy(answer, question.answers, rule),
        metric=METRIC,
        scales=SCALES,
        scorer={"rule": rule, "mode": options["mode"]},
    )
    # What the official rule takes for wrong only because it normalises nothing where all people agree.
    unjust = sum(
        not sample.score and accuracy(sample.answer, sample.references, "min3")[0] == 1
        for sample in scores.samples
        if rule == "vqa" and len(set(sample.references)) == 1
    )
    note = (
        f"{unjust} answers are wrong by no more than capitals, articles or punctuation: the rule compares answers as "
    )
    note += "they are where all people agree (--options mode=min3 and mode=m4c do not)"
    return replace(
        scores,
        counts={**scores.counts, "wrong as written": unjust},
        notes=(*scores.notes, *([note] if unjust else [])),
    )


def load_answered(
    path: Path, only: Collection[str] | None, identify: Callable[[Mapping[str, Any], int], Any] | None = None
) -> dict[str, Question]:
    """The questions that count, by id; arguments as of `Task.score` and `load`.

    Raises:
        ValueError: as of `load` and `by_id`, or a question was answered by one person alone.
    """
    questions = by_id(load(path, "annotations", identify), path, only)
    lone = [name for name, question in questions.items() if len(question.answers) < 2]
    if lone:
        raise ValueError(
            f"{path}: {len(lone)} of {len(questions)} questions have one answer, the first is {lone[0]}. Soft accuracy "
            "takes those of several people (VQA's ten): is this another benchmark's file?"
        )
    return questions


def load(
    path: Path, needs: str = "", identify: Callable[[Mapping[str, Any], int], Any] | None = None
) -> list[Question]:
    """Questions of a file in VQA's form, or of any other that `read_questions` reads, which takes `identify`.

    Args:
        needs: "questions" or "annotations", what has to be there if the form is in two files; where questions are
            needed, answers are taken if they are there.
    Raises:
        ValueError: not in the format, or the file beside it is not there.
    """
    around, rows = open_rows(path)
    types = around.get("question_types")  # of OK-VQA, whose rows have keys of it
    kinds = {
        "answer type": lambda row: row.get("answer_type") or row.get("category"),  # of VizWiz on Hugging Face
        "question type": lambda row: (types or {}).get(row.get("question_type"), row.get("question_type")),
    }
    lists = {name: around.get(name) for name in ("annotations", "questions")}
    if not any(lists.values()):
        return list(read_questions(rows, kinds, identify))
    own = "annotations" if lists["annotations"] else "questions"
    for name, other in lists.items():
        if not other and (name == needs or needs == "questions"):
            lists[name] = _beside(path, name, is_needed=name == needs)
    split = _SPLIT.search(str(around.get("data_subtype", ""))) or _SPLIT.search(path.name)
    joined: dict[Any, dict[str, Any]] = {}
    for name in (own, *(lists.keys() - {own})):
        for index, row in enumerate(lists[name] or []):
            if not (isinstance(row, dict) and "question_id" in row):
                raise ValueError(f"{path} {name}[{index}] has no question_id: {row!r:.80}")
            if name == own:
                if row["question_id"] in joined:
                    raise ValueError(f"{path} has question {row['question_id']} twice")
                joined[row["question_id"]] = dict(row)
            elif row["question_id"] in joined:
                joined[row["question_id"]].update(row)
    for row in joined.values():
        if split and "image" not in row and isinstance(row.get("image_id"), int):
            row["image"] = f"COCO_{split[0].replace('-dev', '')}_{row['image_id']:012d}.jpg"
    return list(read_questions(((f"{path} question {name}", row) for name, row in joined.items()), kinds))


def coco_names(question: Question) -> list[str]:
    """Where a picture of COCO may lie."""
    name = file_name(question)
    coco = _COCO_NAME.fullmatch(name)
    return [name, f"{coco[1]}/{name}", coco[2], f"{coco[1]}/{coco[2]}"] if coco else [name]


def _beside(path: Path, name: str, is_needed: bool) -> list[Any]:
    """The list of the other file of the two."""
    of, to = ("annotations", "questions") if name == "questions" else ("questions", "annotations")
    swapped = path.name.replace(of, to).replace(of.capitalize(), to.capitalize())
    with_kind = re.sub("(?<!OpenEnded_)mscoco_", "OpenEnded_mscoco_", swapped)
    candidates = [path.with_name(swapped.replace("OpenEnded_", "")), path.with_name(swapped), path.with_name(with_kind)]
    other = next((file for file in candidates if file != path and file.is_file()), None)
    if other:
        found = open_rows(other)[0].get(name)
        if isinstance(found, list):
            return found
    if is_needed:
        raise ValueError(f"{path} has no {name}, and no file beside it has them: {candidates[-1].name} is looked for")
    return []
