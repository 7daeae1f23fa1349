"""MMSci's multiple choice: a figure's caption (setting 1), a sub-figure's caption (2), the sub-figure of a caption (3).

Scored as Leezekun/MMSci does it at commit c787815 (mmsci-exps/print_result.py), without its language model: an answer
that is one capital letter is that choice; otherwise a list of rules is tried for A, then for B and so on to Z, whatever
the question has, and the first letter that any rule finds is it. Officially gpt-4o-mini reads what is not a letter
alone, and what it cannot read either leaves the denominator. Here nothing stands in for it: an answer in which the
rules find no letter is `unparsed` and counts as wrong; unparsed=left-out takes it out of the denominator. The gold
answer is that of the question's own row.

The official output has `prediction`, a list of answers with explanations, of which the first counts: the rules read
the explanation where there is one.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from mmcore.evaluation.confidence import Statistic
from mmcore.evaluation.predictions import Predictions, load_predictions, match_answers
from mmcore.evaluation.scores import EvaluationError, Group, Sample, Scores
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options, find_images

if TYPE_CHECKING:
    import numpy as np

METRIC = "accuracy"
SCALES = {METRIC: "percent", **{f"setting_{number}": "percent" for number in (1, 2, 3)}}
OPTIONS = {
    # Which questions count.
    "setting": ("all", "1", "2", "3"),
    # An answer without a letter.
    "unparsed": ("wrong", "left-out"),
}
# mmsci-exps/run_matching.py, QA_TRIGGER.
INSTRUCTION = "\nChoose one answer from available options. Return only your answer."

# What names a letter, tried in turn for each; {a} is the small letter.
RULES = (
    *("*Answer*: {A}", "*Answer*: {a}", "**Answer**: {A}", "**Answer**: {a}", " {A} "),
    *("sub-figure {a}", "subfigure {a}", "sub-figure ({a})", "subfigure ({a})"),
    *("{A}:", " {A}**", "**{A}**", "**{a}**", " {A}.", " {a}."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question; its id is its setting and place in the file, from 0."""

    id: str
    setting: str
    image: str
    text: str
    answer: str
    """A letter; empty where it is not public."""
    subject: str
    category: str


def is_matching(content: Any) -> bool:
    """Whether a file of MMSci holds questions: lists of them by setting, or one list."""
    first = content[0] if isinstance(content, list) and content else None
    first = first[0] if isinstance(first, list) and first else first
    return isinstance(first, dict) and "question" in first


def examples(content: Any, data: Path, images: Path | None, options: Options) -> list[Example]:
    """See `Task.examples`; `content` is that of the file."""
    questions = load_questions(content, data, options["setting"])
    paths = find_images(data, images, [question.image for question in questions])
    return [
        Example(
            id=question.id,
            prompt=question.text + INSTRUCTION,
            images=path,
            references=(question.answer,) if question.answer else (),
            choices=tuple(letter for letter in ascii_uppercase if f"\n{letter}: " in question.text),
        )
        for question, path in zip(questions, paths, strict=True)
    ]


def score(
    content: Any, predictions: Path, references: Path, options: Options, only: Collection[str] | None = None
) -> Scores:
    """See `Task.score`; `content` is that of the references."""
    questions = [
        question
        for question in load_questions(content, references, options["setting"])
        if only is None or question.id in only
    ]
    bare = [question.id for question in questions if not question.answer]
    if bare:
        raise ValueError(
            f"{references}: {len(bare)} of {len(questions)} questions have no answer to compare with, first {bare[0]}: "
            "those of the test split are in image_caption_matching_data_w_answer.json, which MMSci keeps"
        )
    found, explanations = _load_answers(predictions, questions, references)
    samples = []
    for question in questions:
        answer = found.answers[question.id]
        letter = read_letter(answer, explanations.get(question.id) or answer)
        samples.append(
            Sample(
                id=question.id,
                score=float(letter == question.answer),
                answer=answer,
                parsed=letter,
                references=(question.answer,),
                group=question.subject,
            )
        )
    counts_unparsed = options["unparsed"] == "wrong"
    rows = [(sample.score, float(bool(sample.parsed) or counts_unparsed)) for sample in samples]
    num_samples = int(sum(counted for _, counted in rows))
    if not num_samples:
        raise EvaluationError(f"{predictions}: no answer names a letter, so none counts and there is no score")
    parts = {kind: _parts(questions, rows, kind) for kind in ("setting", "subject", "category")}
    tables = {METRIC: rows, **{f"setting_{name}": part for name, part in parts["setting"].items()}}
    notes = list(found.notes)
    if num_unparsed := sum(not sample.parsed for sample in samples):
        notes.append(
            f"the rules find no letter in {num_unparsed} of {len(samples)} answers, which MMSci gives to gpt-4o-mini: "
            "no language model is called here, they "
            + ("count as wrong" if counts_unparsed else "are left out, as MMSci leaves out what it cannot read either")
        )
    return Scores(
        metric=METRIC,
        metrics={name: _accuracy(table) for name, table in tables.items()},
        scales={name: SCALES[name] for name in tables},
        statistics={name: Statistic(rows=table, value=_percent) for name, table in tables.items()},
        samples=samples,
        num_samples=num_samples,
        is_right_or_wrong=True,
        groups={
            kind: {name: Group(score=_accuracy(part), num_samples=len(part)) for name, part in named.items()}
            for kind, named in parts.items()
            if named
        },
        counts={**found.counts, "unparsed": num_unparsed},
        scorer={"rule": "Leezekun/MMSci print_result.py at c787815, without its language model"},
        notes=tuple(notes),
    )


def read_letter(answer: str, explanation: str) -> str:
    """The letter that the rules find, or ""; the rules read the explanation, unless the answer is a letter alone."""
    if len(answer) == 1 and answer in ascii_uppercase:
        return answer
    text = explanation.split("[/INST]")[-1].strip()
    for letter in ascii_uppercase:
        if text == letter or any(rule.format(A=letter, a=letter.lower()) in text for rule in RULES):
            return letter
    return ""


def load_questions(content: Any, path: Path, setting: str = "all") -> list[Question]:
    """All questions of a file, in its order.

    Args:
        content: of the file; of one list that is not by settings all count, whatever `setting` is.
    Raises:
        ValueError: not MMSci's, or it lacks the setting.
    """
    is_nested = isinstance(content[0], list)
    settings = {str(number): rows for number, rows in enumerate(content, 1)} if is_nested else {"": content}
    if is_nested and (len(settings) > 3 or setting not in ("all", *settings)):
        raise ValueError(f"{path} has {len(settings)} settings: MMSci has three, and setting={setting} was asked for")
    try:
        return [
            Question(
                id=f"{number}/{index}" if number else str(index),
                setting=number,
                image=row["image"],
                text=row["question"],
                answer=row.get("answer") or "",
                subject=row.get("subject") or "",
                category=row.get("category") or "",
            )
            for number, rows in settings.items()
            if setting in ("all", number) or not number
            for index, row in enumerate(rows)
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not MMSci's: a question has question, image, answer ({error!r})") from None


def _load_answers(path: Path, questions: Sequence[Question], references: Path) -> tuple[Predictions, dict[str, str]]:
    """Answers and explanations: ours, or the official output, a file or a folder of them (one of each setting)."""
    ids = [question.id for question in questions]
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    rows = [row for file in files for _, row in read_rows(file, "predictions")]
    if not rows or not all(isinstance(row, dict) and {"question", "image"} <= row.keys() for row in rows):
        return load_predictions(path, ids, references), {}
    waiting: dict[tuple[str, str], deque[str]] = defaultdict(deque)
    for question in questions:
        waiting[question.image, question.text].append(question.id)
    answers, explanations = {}, {}
    for row in rows:
        if row.get("prediction"):
            same = waiting[row["image"], row["question"]]
            name = same.popleft() if same else f"{row['image']}: {row['question']:.40}"
            first = row["prediction"][0]
            answers[name] = first["answer"] if isinstance(first, dict) else str(first)
            explanations[name] = first.get("explanation") or "" if isinstance(first, dict) else ""
    return match_answers(path, answers, ids, references), explanations


Rows = list[tuple[float, float]]
"""Of every question: whether it is right, and whether it counts."""


def _parts(questions: Sequence[Question], rows: Rows, kind: str) -> dict[str, Rows]:
    """Rows that count, by setting, subject or category."""
    parts: dict[str, Rows] = defaultdict(list)
    for question, row in zip(questions, rows, strict=True):
        if (name := getattr(question, kind)) and row[1]:
            parts[name].append(row)
    return dict(sorted(parts.items()))


def _accuracy(rows: Rows) -> float:
    return 100 * sum(right for right, _ in rows) / sum(counted for _, counted in rows)


def _percent(sums: "np.ndarray") -> Any:
    return 100 * sums[..., 0] / sums[..., 1]
