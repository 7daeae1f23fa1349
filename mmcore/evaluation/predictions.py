"""Files of predictions, ours and those of the benchmarks, checked against the ids of the references.

Rows of JSON lines, of a JSON list or of a table (TSV, CSV, XLSX, Parquet), by the pairs of columns of `FORMATS`; or
one JSON object, of ids to answers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmcore.evaluation.scores import EvaluationError, write_whole
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, sample_id

# Columns of the id and of the text: `mmcore generate` writes the first pair, COCO's result lists have the second,
# VQA's the third, LLaVA's answer files the fourth.
FORMATS = (("id", "answer"), ("image_id", "caption"), ("question_id", "answer"), ("question_id", "text"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """One answer for every reference, and for nothing else."""

    answers: dict[str, str]
    """Id to answer, in the order of the references."""
    counts: dict[str, int]
    """Of empty, repeated and missing ones."""
    notes: tuple[str, ...]
    """What was found and let pass."""


def load_predictions(
    path: Path,
    ids: Sequence[str],
    references: Path,
    *,
    formats: Sequence[tuple[str, str]] = FORMATS,
    missing: Literal["refuse", "empty"] = "refuse",
) -> Predictions:
    """Read predictions and see that they are those of the references.

    Args:
        path: see `read_predictions`.
        ids: of the references.
        references: their file, for messages.
        formats: pairs of columns that the task's files can have.
        missing: "empty" where the official scorer takes a sample without a prediction for a wrong one; some have to
            be there all the same.
    Raises:
        ValueError: missing, unreadable, or in neither format.
        EvaluationError: ids are missing, foreign, or have two different answers.
    """
    answers: dict[str, str] = {}
    num_repeated = 0
    contradictory: dict[str, None] = {}
    for name, answer in read_predictions(path, formats):
        if name not in answers:
            answers[name] = answer
        elif answers[name] == answer:
            num_repeated += 1
        else:
            contradictory[name] = None
    return match_answers(path, answers, ids, references, missing, num_repeated, list(contradictory))


def match_answers(
    path: Path,
    answers: Mapping[str, str],
    ids: Sequence[str],
    references: Path,
    missing: Literal["refuse", "empty"] = "refuse",
    num_repeated: int = 0,
    contradictory: Sequence[str] = (),
) -> Predictions:
    """See that answers are those of the references; arguments and errors as of `load_predictions`."""
    known = set(ids)
    absent = [name for name in ids if name not in answers]
    is_refused = missing == "refuse" or len(absent) == len(ids)
    findings = [
        f"{len(found)} {finding} ({_some(found)})"
        for finding, found in {
            f"of {len(known)} samples have no prediction": absent if is_refused else [],
            f"of {len(answers)} predictions are for samples that the references do not have": [
                name for name in answers if name not in known
            ],
            "samples have two different predictions": contradictory,
        }.items()
        if found
    ]
    if findings:
        raise EvaluationError(
            f"{path} does not answer {references}: {'; '.join(findings)}. A score would be meaningless, so none is "
            "written: finish generating, or give the references that these predictions were made for"
        )
    found = {name: answers.get(name, "") for name in ids}
    num_empty = sum(not answer.strip() for answer in found.values()) - len(absent)
    notes = []
    if num_repeated:
        notes.append(f"{num_repeated} predictions are there more than once, each with the same answer: counted once")
    if num_empty:
        notes.append(f"{num_empty} of {len(found)} answers are empty; they are scored like any other")
    if absent:
        notes.append(f"{len(absent)} of {len(found)} samples have no prediction ({_some(absent)}): they count as wrong")
    counts = {"empty": num_empty, "missing": len(absent), "repeated": num_repeated}
    return Predictions(answers=found, counts=counts, notes=tuple(notes))


def write_predictions(path: Path, examples: Sequence[Example], answers: Sequence[str]) -> None:
    """Write JSON lines of id, prompt and answer, whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    rows = [
        {"id": example.id, "prompt": example.prompt, "answer": answer}
        for example, answer in zip(examples, answers, strict=True)
    ]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_predictions(path: Path, formats: Sequence[tuple[str, str]] = FORMATS) -> Iterator[tuple[str, str]]:
    """Yield (id, answer) row by row.

    Raises:
        ValueError: missing, unreadable, or in none of the formats.
    """
    for where, row in read_rows(path, "predictions"):
        pair = next((keys for keys in formats if isinstance(row, dict) and row.keys() >= set(keys)), None)
        if pair:
            yield sample_id(row[pair[0]], where), _answer(row[pair[1]], pair[1], where)
        elif where == str(path) and not {name for name, _ in formats} & row.keys():  # one object, of ids to answers
            yield from ((name, _answer(value, name, where)) for name, value in row.items())
        else:
            found = f"has {', '.join(sorted(row)) or 'nothing'}" if isinstance(row, dict) else f"is {row!r:.80}"
            wanted = ", or ".join(" and ".join(keys) for keys in formats)
            raise ValueError(f"{where}: a prediction has {wanted}; this one {found}")


def _answer(value: Any, name: str, where: str) -> str:
    """An answer as text: tables hold a number as a number."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{where}: {name} is a text, not {value!r:.80}")


def _some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
