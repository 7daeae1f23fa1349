"""Letters read out of answers to questions of multiple choice, and the share of right ones.

Rules differ by benchmark, and its file says which is its own. None of them guesses: what cannot be read is wrong, and
is counted as unparsed.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mmcore.evaluation import predictions
from mmcore.evaluation.choice_questions import Question
from mmcore.evaluation.confidence import mean
from mmcore.evaluation.scores import EvaluationError, Group, Sample, Scores

METRIC = "accuracy"

# SEED-Bench's results have the first pair, VLMEvalKit's the second, beside a column of right answers called `answer`.
FORMATS = (("question_id", "prediction"), ("index", "prediction"), *predictions.FORMATS)


def llava_letter(answer: str, letters: str) -> str:
    """The letter in an answer, "" if none is found or it is not among `letters`.

    The answer is a letter; or begins with one, a full stop and a space; or says "The answer is X" once, with anything
    but a line's end after it. Source: LLaVA, llava/eval/eval_science_qa.py at commit c121f04.
    """
    if answer in tuple("ABCDE"):
        found = answer
    elif len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        found = answer[0]
    else:
        said = re.findall(r"The answer is ([A-Z]).", answer)
        found = said[0] if len(said) == 1 else ""
    return found if found in tuple(letters) else ""


def leading_letter(answer: str, letters: str) -> str:
    """The letter in an answer, "" if none is found or it is not among `letters`.

    The answer begins with a letter and a full stop; or is a letter, in either case, once its punctuation is gone.
    Source: lmms-eval, lmms_eval/tasks/ai2d (its filter, and exact_match of lmms_eval/api/metrics.py) at commit 75571cf.
    """
    begins = re.match(r"\s*([A-Z])\.", answer)
    found = (begins[1] if begins else answer).translate(str.maketrans("", "", string.punctuation)).upper()
    return found if found in tuple(letters) else ""


def first_letter(answer: str, letters: str) -> str:
    """The first character of an answer, if it is among `letters` in either case.

    Source: lmms-eval, lmms_eval/tasks/seedbench/utils.py at commit 75571cf.
    """
    found = answer.strip()[:1].upper()
    return found if found in tuple(letters) else ""


def load_answers(
    path: Path,
    questions: Sequence[Question],
    references: Path,
    *,
    others: Sequence[str] = (),
    missing: Literal["refuse", "empty"] = "refuse",
) -> predictions.Predictions:
    """See `load_predictions`.

    Args:
        others: ids that the references have too but that do not count; answers to them are passed over.
    Raises:
        ValueError: a right answer is not known, or as of `load_predictions`.
        EvaluationError: no question is answered, or as of `load_predictions`.
    """
    if not all(question.answer for question in questions):
        raise ValueError(f"{references}: right answers are missing, of a split whose answers are not public?")
    given = {name for name, _ in predictions.read_predictions(path, FORMATS)} if others else set()
    if others and not any(question.id in given for question in questions):
        raise EvaluationError(f"{path} answers none of the {len(questions)} questions of {references} that count")
    ids = [*(question.id for question in questions), *(name for name in others if name in given)]
    found = predictions.load_predictions(path, ids, references, formats=FORMATS, missing=missing)
    return predictions.Predictions(
        answers={question.id: found.answers[question.id] for question in questions},
        counts=found.counts,
        notes=found.notes,
    )


def score_answers(
    questions: Sequence[Question],
    found: predictions.Predictions,
    read: Callable[[str, Question], str],
    *,
    scorer: Mapping[str, str],
) -> Scores:
    """The share of right answers, in all and by group; in percent.

    Args:
        read: of an answer and its question what is compared with the right one; "" where nothing can be read.
        scorer: see `Scores.scorer`.
    """
    samples = []
    groups: dict[str, dict[str, list[float]]] = {}
    for question in questions:
        answer = found.answers[question.id]
        parsed = read(answer, question)
        right = float(parsed == question.answer)
        for kind, names in question.groups.items():
            for name in names:
                groups.setdefault(kind, {}).setdefault(name, []).append(right)
        samples.append(
            Sample(
                id=question.id,
                score=right,
                answer=answer,
                parsed=parsed,
                references=(question.answer,),
                group=next((names[0] for names in question.groups.values() if names), ""),
            )
        )
    rights = [sample.score for sample in samples]
    unparsed = sum(not sample.parsed and bool(sample.answer.strip()) for sample in samples)
    return Scores(
        metric=METRIC,
        metrics={METRIC: sum(rights) / len(rights) * 100},
        scales={METRIC: "percent"},
        samples=samples,
        is_right_or_wrong=True,
        groups={
            kind: {name: Group(score=sum(row) / len(row) * 100, num_samples=len(row)) for name, row in rows.items()}
            for kind, rows in groups.items()
        },
        counts={**found.counts, "unparsed": unparsed},
        statistics={METRIC: mean(rights)},
        scorer=scorer,
        notes=found.notes,
    )
