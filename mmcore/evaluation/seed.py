"""SEED-Bench (the first): questions of multiple choice on what is in pictures, and in videos, by 12 dimensions.

The official results are letters, of the choice with the lowest loss (AILab-CVC/SEED-Bench, eval.py at commit 991e849);
LLaVA's scripts/convert_seed_for_submission.py (at commit c121f04) scores what a model answers, and that is right if it
is the letter and nothing else. A question without an answer is wrong. Accuracy, in percent; of the pictures by default,
as the published SEED-Bench image figures are.

Questions are read from SEED-Bench.json, from the Parquet files of lmms-lab/SEED-Bench and from VLMEvalKit's
SEEDBench_IMG.tsv. Pictures of the first are named by data_id, in `images` or its SEED-Bench-image; of a video it is the
frame in its middle that LLaVA's extract_video_frames.py writes to SEED-Bench-video-image.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore.evaluation.choice_questions import Question, as_examples, named, read_shards, table_questions
from mmcore.evaluation.metrics.choices import first_letter, load_answers, score_answers
from mmcore.evaluation.predictions import Predictions
from mmcore.evaluation.scores import Scores, write_whole
from mmcore.evaluation.tables import Row
from mmcore.evaluation.task import Example, Options

METRIC = "accuracy"
SCALES = {METRIC: "percent"}
OPTIONS = {
    "part": ("image", "video", "all"),
    # exact: the letter and nothing else; first: the first character, in either case, as lmms-eval does.
    "letters": ("exact", "first"),
}

# `question_type` of SEED-Bench.json.
DIMENSIONS = (
    "Scene Understanding",
    "Instance Identity",
    "Instance Attributes",
    "Instance Location",
    "Instances Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Understanding",
    "Action Recognition",
    "Action Prediction",
    "Procedure Understanding",
)
NUM_IMAGE = 9  # of them, the first

# The published SEED-Bench.json has an id twice: one answer counts for both rows, as it does for LLaVA's script.
AGAIN = " (again)"


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; asked as LLaVA does."""
    questions = [q for q in select(load_questions(data), options["part"]) if not q.id.endswith(AGAIN)]
    names = [next((name for name in question.pictures if isinstance(name, str)), None) for question in questions]
    bare = [name and name.partition("/")[2] for name in names]
    found = named(data, images, names, bare)
    return as_examples(
        data,
        images,
        [replace(q, pictures=(name,)) if name else q for q, name in zip(questions, found, strict=True)],
    )


def load_questions(path: Path, *, pictures: bool = True) -> list[Question]:
    """All questions; arguments as of `table_questions`.

    Raises:
        ValueError: not this benchmark's files.
    """
    return [
        replace(question, groups=_groups(question.groups.get("category", ("",))[0]))
        for question in table_questions(_rows(path), pictures=pictures)
    ]


def _rows(path: Path) -> Iterator[Row]:
    """Rows whose category is the dimension, after its number where there is one."""
    seen: set[Any] = set()
    for where, row in read_shards(path, "references", "test"):
        if isinstance(row, dict) and isinstance(row.get("questions"), list):
            names = {number: name for name, number in row.get("question_type", {}).items()}
            for number, one in enumerate(row["questions"]):
                one = _named(one, names)
                name = one.get("question_id") if isinstance(one, dict) else None
                yield f"{where} question {number}", {**one, "question_id": f"{name}{AGAIN}"} if name in seen else one
                seen.add(name)
        else:
            yield where, _named(row, {})


def _named(row: Any, dimensions: Mapping[int, str]) -> Any:
    """The row with its dimension as category, and with the names of its pictures where it has none."""
    if not isinstance(row, dict) or "question_type_id" not in row:
        return row
    kind = int(row["question_type_id"])
    name = dimensions.get(kind) or (DIMENSIONS[kind - 1] if 0 < kind <= len(DIMENSIONS) else f"dimension {kind}")
    picture = f"SEED-Bench-image/{row.get('data_id')}"
    if kind > NUM_IMAGE:
        picture = f"SEED-Bench-video-image/{kind}_{row.get('question_id')}.png"
    return {"image": picture, **row, "category": f"{kind} {name}"}


def _groups(category: str) -> dict[str, tuple[str, ...]]:
    number, _, name = category.partition(" ")
    if not number.isdigit():  # VLMEvalKit's table, of pictures alone
        return {"dimension": (category,), "part": ("image",)} if category else {"part": ("image",)}
    return {"dimension": (name,), "part": ("image" if int(number) <= NUM_IMAGE else "video",)}


def select(questions: Sequence[Question], part: str) -> list[Question]:
    """The questions of a part; see OPTIONS."""
    found = [question for question in questions if part == "all" or part in question.groups["part"]]
    if not found:
        raise ValueError(f"part={part}: the references have no such questions")
    return found


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    known = load_questions(references, pictures=False)
    known = [q for q in known if only is None or q.id.removesuffix(AGAIN) in only]
    questions = select(known, options["part"])
    return score_answers(
        questions,
        _answers(predictions, references, known, questions),
        lambda answer, question: read_answer(answer, question, options),
        scorer={"rule": "LLaVA convert_seed_for_submission.py at c121f04", **options},
    )


def _answers(path: Path, references: Path, known: Sequence[Question], questions: Sequence[Question]) -> Predictions:
    """Answers to `questions`; those to others of the known are passed over."""
    asked = [question for question in questions if not question.id.endswith(AGAIN)]
    others = list({question.id for question in known} - {question.id for question in asked})
    found = load_answers(path, asked, references, others=others, missing="empty")
    answers = {question.id: found.answers[question.id.removesuffix(AGAIN)] for question in questions}
    return replace(found, answers=answers)


def read_answer(answer: str, question: Question, options: Options) -> str:
    """The letter in an answer, "" if there is none."""
    if options["letters"] == "first":
        return first_letter(answer, question.letters)
    return answer if answer in tuple(question.letters) else ""


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """Write the lines that the leaderboard takes."""
    known = load_questions(references, pictures=False)
    questions = [q for q in select(known, options["part"]) if not q.id.endswith(AGAIN)]
    found = _answers(predictions, references, known, questions)
    rows = [
        {"question_id": question.id, "prediction": read_answer(found.answers[question.id], question, options)}
        for question in questions
    ]
    write_whole(output, "".join(json.dumps(row) + "\n" for row in rows).encode())
