"""Files of predictions: ours (JSON lines) and COCO's result list, checked against the ids of the references."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.evaluation.scores import EvaluationError, write_whole
from mmcore.evaluation.task import Example, read_json, sample_id

# Keys of the id and of the text: `mmcore generate` writes the first pair, COCO's result lists have the second.
FORMATS = (("id", "answer"), ("image_id", "caption"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """One answer for every reference, and for nothing else."""

    answers: dict[str, str]
    """Id to answer, in the order of the references."""
    num_empty: int
    notes: tuple[str, ...]
    """What was found and let pass."""


def load_predictions(path: Path, ids: Sequence[str], references: Path) -> Predictions:
    """Read predictions and see that they are those of the references.

    Args:
        path: JSON lines or a JSON list.
        ids: of the references.
        references: their file, for messages.
    Raises:
        ValueError: missing, unreadable, or in neither format.
        EvaluationError: ids are missing, foreign, or have two different answers.
    """
    answers: dict[str, str] = {}
    num_repeated = 0
    contradictory: dict[str, None] = {}
    for name, answer in read_predictions(path):
        if name not in answers:
            answers[name] = answer
        elif answers[name] == answer:
            num_repeated += 1
        else:
            contradictory[name] = None
    known = set(ids)
    findings = [
        f"{len(found)} {finding} ({_some(found)})"
        for finding, found in {
            f"of {len(known)} samples have no prediction": [name for name in ids if name not in answers],
            f"of {len(answers)} predictions are for samples that the references do not have": [
                name for name in answers if name not in known
            ],
            "samples have two different predictions": list(contradictory),
        }.items()
        if found
    ]
    if findings:
        raise EvaluationError(
            f"{path} does not answer {references}: {'; '.join(findings)}. A score would be meaningless, so none is "
            "written: finish generating, or give the references that these predictions were made for"
        )
    answers = {name: answers[name] for name in ids}
    num_empty = sum(not answer.strip() for answer in answers.values())
    notes = []
    if num_repeated:
        notes.append(f"{num_repeated} predictions are there more than once, each with the same answer: counted once")
    if num_empty:
        notes.append(f"{num_empty} of {len(answers)} answers are empty; they are scored like any other")
    return Predictions(answers=answers, num_empty=num_empty, notes=tuple(notes))


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


def read_predictions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, answer) row by row.

    Raises:
        ValueError: missing, unreadable, or in neither format.
    """
    for where, row in _rows(path):
        pair = next((keys for keys in FORMATS if isinstance(row, dict) and row.keys() >= set(keys)), None)
        if pair is None:
            found = f"has {', '.join(sorted(row)) or 'nothing'}" if isinstance(row, dict) else f"is {row!r:.80}"
            raise ValueError(f"{where}: a prediction has id and answer, or image_id and caption; this one {found}")
        answer = row[pair[1]]
        if not isinstance(answer, str):
            raise ValueError(f"{where}: {pair[1]} is a text, not {answer!r:.80}")
        yield sample_id(row[pair[0]], where), answer


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, content) of every row of a JSON list or of JSON lines."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            if file.read(1024).lstrip().startswith("["):
                yield from ((f"{path} row {index}", row) for index, row in enumerate(read_json(path, "predictions")))
                return
            file.seek(0)
            # Not splitlines(): it would also split at U+2028 and the like, inside of an answer.
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", json.loads(line)
    except OSError as error:
        raise ValueError(f"predictions {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"predictions {path} is not UTF-8 text: byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {number} is not JSON ({error.msg}): predictions are JSON lines, or one JSON list"
        ) from None


def _some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
