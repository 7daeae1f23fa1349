"""RealWorldQA: questions on photos, many from cars, answered by a letter, a number or a word.

xAI published no scorer. The rule is that of lmms-eval, by which figures were reported from 2024 on
(lmms_eval/tasks/realworldqa at commit d8fcb9c; in 2026 it became another): a spelled number from zero to ten becomes
digits; what is no letter, digit, underscore or space is dropped; where one of the question's choices is in the rest,
as it is written, the first one found gives its letter; and the whole has to be the right answer, case aside. Accuracy,
in percent.

Questions, which hold their choices and the wish for a letter, are read from the Parquet files of xai-org/RealworldQA
and lmms-lab/RealWorldQA, from the annotations.json of the zip, and from VLMEvalKit's RealWorldQA.tsv, whose choices
are columns. Without ids the row's number counts, from 0.
"""

import re
from collections.abc import Collection
from pathlib import Path

from mmcore.evaluation.choice_questions import LETTERS, Question, as_examples, read_shards, table_questions
from mmcore.evaluation.metrics.choices import load_answers, score_answers
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.task import Example, Options

METRIC = "accuracy"
SCALES = {METRIC: "percent"}
OPTIONS: dict[str, tuple[str, ...]] = {}

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; the question is asked as it is."""
    return as_examples(data, images, table_questions(read_shards(data, "references", "test")))


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    questions = table_questions(read_shards(references, "references", "test"), pictures=False)
    questions = [question for question in questions if only is None or question.id in only]
    return score_answers(
        questions,
        load_answers(predictions, questions, references),
        read_answer,
        scorer={"rule": "lmms-eval realworldqa at d8fcb9c"},
    )


def read_answer(answer: str, question: Question) -> str:
    """What the rule makes of an answer, the right one itself if it is that."""
    text = str(NUMBERS.index(answer.lower())) if answer.lower() in NUMBERS else answer
    text = re.sub(r"[^\w\s]", "", text).strip()
    choices = question.choices or [choice.strip() for choice in re.findall(r"\b[A-Z]\.\s+([^\n]*)", question.question)]
    found = re.search("|".join(map(re.escape, choices)), text)
    if found and found[0] in choices:
        # Of a choice that is there twice the last letter counts.
        text = LETTERS[len(choices) - 1 - [*choices][::-1].index(found[0])]
    return question.answer if text.lower().strip().rstrip(".") == question.answer.lower() else text
