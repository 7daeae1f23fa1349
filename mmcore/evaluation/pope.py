"""POPE: is there such a thing in the picture? Asked for what is there and what is not, drawn in three ways.

An answer is read as the official evaluate.py does (RUCAIBox/POPE at commit 3df3ba1; LLaVA's llava/eval/eval_pope.py has
the same rule): of what comes before the first full stop, without commas, if one of the words between spaces is "No",
"no" or "not", it is no, and anything else is yes; "unparsed" counts what says neither. With yes as the positive, the
metrics are accuracy, precision, recall, F1 and the share of yes.

There is one such table for each way to draw what is asked for: random, popular and adversarial. LLaVA and those after
it report the mean of the three F1, which is `score`; all five are means over the categories, in percent, and of a
single category its own. More yes is not better: an even share is right. What divides by zero, where the official
script stops, is 0.

Questions are read from the official coco_pope_*.json (one, or a folder of them), from the Parquet files of
lmms-lab/POPE and from VLMEvalKit's POPE.tsv, which name the category. The official answer file has no ids but the order
of the questions; LLaVA's has the ids of its llava_pope_test.jsonl. Answers may also be a folder, a file a category.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmcore.evaluation.choice_questions import SHORT_INSTRUCTION, cells, describe, find_pictures, read_shards
from mmcore.evaluation.confidence import Statistic
from mmcore.evaluation.metrics.choices import FORMATS
from mmcore.evaluation.predictions import match_answers
from mmcore.evaluation.scores import EvaluationError, Group, Sample, Scores
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options, sample_id

if TYPE_CHECKING:
    import numpy as np

METRIC = "f1"
SCALES = dict.fromkeys((METRIC, "accuracy", "precision", "recall", "yes_ratio"), "percent")
OPTIONS: dict[str, tuple[str, ...]] = {}

# Of LLaVA's ids, the number that those of the category's own file are raised by.
RAISED = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A row of the references."""

    id: str
    number: str
    """Its id in its file."""
    text: str
    picture: tuple[str | bytes, ...]
    label: str
    """yes or no."""
    categories: tuple[str, ...]
    """One; in VLMEvalKit's table all that ask this; "" where the file does not tell."""


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`."""
    questions = load_questions(data)
    pictures = find_pictures(data, images, [question.picture for question in questions])
    return [
        Example(
            id=question.id,
            prompt=f"{question.text}\n{SHORT_INSTRUCTION}",
            images=shown,
            references=(question.label,),
            choices=("Yes", "No"),
        )
        for question, shown in zip(questions, pictures, strict=True)
    ]


def load_questions(path: Path) -> list[Question]:
    """Questions of a file, or of all files of a folder; their ids have the category before them where numbers repeat.

    Raises:
        ValueError: not this benchmark's files, or a question is there twice.
    """
    rows = []
    for file in (sorted(path.glob("*pope_*.json*")) if path.is_dir() else []) or [path]:
        for number, (where, row) in enumerate(read_shards(file, "references")):
            if (
                not isinstance(row, dict)
                or not {"label", "answer"} & row.keys()
                or not {"text", "question"} & row.keys()
            ):
                raise ValueError(f"{where} is no question of POPE (question_id, image, text, label): {describe(row)}")
            label = str(row.get("label", row.get("answer"))).strip().lower()
            if label not in ("yes", "no"):
                raise ValueError(f"{where}: what is right is yes or no, not {label!r}")
            name = sample_id(next((row[key] for key in ("index", "question_id", "id") if key in row), number), where)
            text = str(row.get("text", row.get("question"))).strip()
            categories = tuple(str(row.get("category") or category_of(file)).split(","))
            rows.append((name, text, cells(row.get("image")), label, categories))
    is_unique = len({row[0] for row in rows}) == len(rows)
    found = {}
    for name, text, picture, label, categories in rows:
        key = name if is_unique else f"{categories[0]}/{name}"
        if key in found:
            raise ValueError(f"{path} has question {key} twice")
        found[key] = Question(id=key, number=name, text=text, picture=picture, label=label, categories=categories)
    if not found:
        raise ValueError(f"{path} has no questions")
    return list(found.values())


def category_of(path: Path) -> str:
    """What a file's name tells: coco_pope_random.json is of random."""
    found = re.search("|".join(RAISED), path.name)
    return found[0] if found else ""


def read_answer(answer: str) -> str:
    """yes or no, by the official rule."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def says_neither(answer: str) -> bool:
    """Whether the rule's yes has nothing to do with what the answer says."""
    return read_answer(answer) == "yes" and not re.search(r"\byes\b", answer, re.IGNORECASE)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    import numpy as np

    questions = [question for question in load_questions(references) if only is None or question.id in only]
    answers: dict[str, str] = {}
    num_repeated, contradictory = 0, []
    for name, answer in _answers(predictions, questions):
        if name not in answers:
            answers[name] = answer
        elif answers[name] == answer:
            num_repeated += 1
        else:
            contradictory.append(name)
    ids = [question.id for question in questions]
    found = match_answers(predictions, answers, ids, references, "refuse", num_repeated, contradictory)
    categories = list(dict.fromkeys(name for question in questions for name in question.categories))
    table = np.zeros((len(questions), len(categories), 4))
    samples = []
    for row, question in enumerate(questions):
        parsed = read_answer(found.answers[question.id])
        # True and false positives, true and false negatives.
        kind = (0 if question.label == "yes" else 1) if parsed == "yes" else (2 if question.label == "no" else 3)
        for name in question.categories:
            table[row, categories.index(name), kind] = 1
        samples.append(
            Sample(
                id=question.id,
                score=float(parsed == question.label),
                answer=found.answers[question.id],
                parsed=parsed,
                references=(question.label,),
                group=question.categories[0],
            )
        )
    sums = table.sum(axis=0)
    by_category = {name: rates(sums[number]) for number, name in enumerate(categories)}
    return Scores(
        metric=METRIC,
        metrics={name: float(np.mean([row[name] for row in by_category.values()])) for name in SCALES},
        scales=SCALES,
        samples=samples,
        is_right_or_wrong=True,
        groups={
            kind: {
                category: Group(score=float(row[name]), num_samples=int(sums[number].sum()))
                for number, (category, row) in enumerate(by_category.items())
                if category
            }
            for name, kind in {name: "category" if name == METRIC else f"category, {name}" for name in SCALES}.items()
        }
        if any(categories)
        else {},
        counts={**found.counts, "unparsed": sum(says_neither(sample.answer) for sample in samples)},
        statistics={name: _statistic(table, name) for name in SCALES},
        scorer={"rule": "RUCAIBox/POPE evaluate.py at 3df3ba1, mean over categories"},
        notes=found.notes,
    )


def rates(sums: "np.ndarray") -> dict[str, "np.ndarray"]:
    """The five metrics of counts of true and false positives, true and false negatives: [..., 4] -> [...], percent."""
    import numpy as np

    true_yes, false_yes, true_no, false_no = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = true_yes / (true_yes + false_yes), true_yes / (true_yes + false_no)
        found = {
            METRIC: 2 * precision * recall / (precision + recall),
            "accuracy": (true_yes + true_no) / sums.sum(-1),
            "precision": precision,
            "recall": recall,
            "yes_ratio": (true_yes + false_yes) / sums.sum(-1),
        }
    return {name: 100 * np.nan_to_num(value) for name, value in found.items()}


def _statistic(table: "np.ndarray", name: str) -> Statistic:
    """The mean of a metric over the categories; table [n, categories, 4]."""
    shape = table.shape[1:]
    return Statistic(
        rows=table.reshape(len(table), -1),
        value=lambda sums: rates(sums.reshape(*sums.shape[:-1], *shape))[name].mean(axis=-1),
    )


def _answers(path: Path, questions: Sequence[Question]) -> Iterator[tuple[str, str]]:
    """(id of the question, answer) of a file of predictions, or of all files of a folder."""
    categories = {name: [q for q in questions if name in q.categories] for q in questions for name in q.categories}
    names = {question.id: question.id for question in questions}
    for question in questions:
        for name in question.categories:
            if name in RAISED and question.number.isdigit():
                names.setdefault(str(RAISED[name] + int(question.number)), question.id)
    if not path.is_dir():
        yield from _file_answers(path, next(iter(categories.values())) if len(categories) == 1 else None, names)
        return
    for file in sorted(file for file in path.iterdir() if category_of(file) in categories):
        own = categories[category_of(file)]
        yield from _file_answers(file, own, {**names, **{question.number: question.id for question in own}})


def _file_answers(path: Path, ordered: Sequence[Question] | None, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Answers of one file.

    Args:
        ordered: the questions that rows without ids stand for, if that is known.
        names: ids as the file may have them, to the questions' own; others stay as they are.
    """
    rows = list(read_rows(path, "predictions"))
    bare = 0
    for where, row in rows:
        pair = next((pair for pair in FORMATS if isinstance(row, dict) and row.keys() >= set(pair)), None)
        if where == str(path) and not pair and all(isinstance(value, str) for value in row.values()):
            yield from (
                (names.get(name, name), answer) for name, answer in row.items()
            )  # one object, of ids to answers
            continue
        if not isinstance(row, dict) or "label" in row or not (pair or "answer" in row):
            raise ValueError(f"{where}: an answer to POPE has answer, or an id with answer or text: {describe(row)}")
        answer = row[pair[1] if pair else "answer"]
        if not isinstance(answer, str):
            raise ValueError(f"{where}: an answer is a text, not {answer!r:.80}")
        if pair:
            name = sample_id(row[pair[0]], where)
            yield names.get(name, name), answer
            continue
        if ordered is None or len(ordered) != len(rows):
            raise EvaluationError(
                f"{path} has {len(rows)} answers without ids, which have to be those of one category's questions, in "
                f"their order; the references have {len(ordered) if ordered else 'several categories'}"
            )
        if ordered[bare].text.casefold() not in str(row.get("question", ordered[bare].text)).casefold():
            raise EvaluationError(
                f"{where} answers {row['question']!r:.80}, but the question in that place is {ordered[bare].text!r}: "
                "answers without ids have to be in the order of the questions"
            )
        yield ordered[bare].id, answer
        bare += 1
