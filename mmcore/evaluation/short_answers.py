"""Questions with short free answers: the rows of their files, what a model is asked, and scores of judged answers.

Benchmarks of this kind are published as JSON objects around a list (`data`, `annotations`, `questions`), as lists, as
JSON lines, as Parquet tables with the pictures inside (Hugging Face; a folder of them is one table) and as TSV tables
with pictures in base64 (VLMEvalKit). Names of columns differ little, so that one reader takes all of them.
"""

import base64
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from mmcore.evaluation.confidence import Statistic, mean
from mmcore.evaluation.predictions import FORMATS, Predictions, load_predictions
from mmcore.evaluation.scores import Group, Sample, Scores, write_whole
from mmcore.evaluation.tables import Row, read_rows
from mmcore.evaluation.task import Example, find_images, only_these, sample_id
from mmcore.foreign import parse_literal

# LLaVA-1.5's words for a short answer: haotian-liu/LLaVA, docs/Evaluation.md at commit c121f04.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."

# VLMEvalKit's tables have the reference as `answer`, so that theirs comes first; the last is Megatron-LM's.
ANSWER_FORMATS = (("index", "prediction"), *FORMATS, ("questionId", "answer"), ("sample_id", "answer"))

_LISTS = ("data", "annotations", "questions")
_IDS = ("index", "question_id", "questionId", "id")
_TEXTS = ("question", "query", "text")
_ANSWERS = ("answers", "answer", "label")
_IMAGES = ("image", "imgname", "image_path", "image_local_name")
_IMAGE_IDS = ("image_id", "imageId")
_BASE64_LENGTH = 1000  # characters; the name of a file is shorter, a picture longer

Kinds = Mapping[str, Callable[[Mapping[str, Any]], Any]]
"""Name of a way to group questions, and what finds in a row the group, several, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A row of a benchmark's file."""

    id: str
    text: str = ""
    """Empty in files of answers alone."""
    image: str | bytes | None = None
    """Name of its file, or the picture itself."""
    image_id: str = ""
    answers: tuple[str, ...] = ()
    """None in splits whose answers are not public."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By kind."""


def open_rows(path: Path) -> tuple[Mapping[str, Any], Iterator[Row]]:
    """What stands around the rows (nothing, unless they are in a JSON object), and the rows.

    Raises:
        ValueError: the file is missing, unreadable, empty, or a folder without Parquet tables.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    rows = chain.from_iterable(read_rows(file, "references") for file in files)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} has no rows" if files else f"{path} is a folder without Parquet tables: name a file")
    where, content = first
    if isinstance(content, dict):
        key = next((key for key in _LISTS if isinstance(content.get(key), list)), None)
        if key:
            return content, ((f"{where} {key}[{index}]", row) for index, row in enumerate(content[key]))
        if content and all(isinstance(row, dict) for row in content.values()):
            return {}, ((f"{where} {name}", {"id": name, **row}) for name, row in content.items())
    return {}, chain([first], rows)


def read_questions(
    rows: Iterator[Row], kinds: Kinds, identify: Callable[[Mapping[str, Any], int], Any] | None = None
) -> Iterator[Question]:
    """Yield the questions of rows.

    Args:
        kinds: how they are grouped.
        identify: finds the id in a row and its number; by default it is in a column of its own.
    Raises:
        ValueError: a row is not a question, or has no id.
    """
    for number, (where, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no question but {row!r:.80}")
        name = identify(row, number) if identify else _cell(row, _IDS)
        if name is None:
            raise ValueError(f"{where} is no question with an id: it has {', '.join(sorted(row)) or 'nothing'}")
        groups = {kind: _texts(find(row), where) for kind, find in kinds.items()}
        yield Question(
            id=sample_id(name, where),
            text=str(_cell(row, _TEXTS) or ""),
            image=_picture(_cell(row, _IMAGES), where),
            image_id="".join(_texts(_cell(row, _IMAGE_IDS), where)),
            answers=_answers(row, where),
            groups={kind: names for kind, names in groups.items() if names},
        )


def _cell(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    value = _cell(row, _ANSWERS)
    if isinstance(value, str) and value.startswith("[") and "index" in row:  # a table's cell holds a list as text
        with suppress(ValueError):
            value = parse_literal(value)
    if isinstance(value, list):
        value = [answer.get("answer") if isinstance(answer, dict) else answer for answer in value]
    answers = _texts(value, where)
    return answers if any(answers) else ()  # test splits are padded with empty ones


def _texts(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(item, (str, int, float)) for item in values):
        raise ValueError(f"{where}: texts are expected, not {value!r:.80}")
    return tuple(str(item) for item in values)


def _picture(value: Any, where: str) -> str | bytes | None:
    if isinstance(value, dict):  # Hugging Face's
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{where}: a picture is a file's name or its contents, not {value!r:.80}")
    return base64.b64decode(value) if len(value) > _BASE64_LENGTH else value


def file_name(question: Question) -> str:
    """Of its picture, or "" if it has the picture itself, or names none."""
    return question.image if isinstance(question.image, str) else ""


def ask(
    data: Path,
    images: Path | None,
    questions: Sequence[Question],
    suffix: str = SHORT_ANSWER,
    names: Callable[[Question], Sequence[str]] = lambda question: [file_name(question)],
) -> list[Example]:
    """Examples of questions.

    Args:
        data, images: as of `Task.examples`.
        suffix: what follows the question, unless it ends with that already, as in LLaVA's own files of questions.
        names: where a picture that is not in the data may lie in the folder of pictures; the first one tells where.
    Raises:
        ValueError: a question has no words, or no picture.
    """
    bare = [question.id for question in questions if not question.text]
    if bare:
        raise ValueError(f"{data}: {len(bare)} of {len(questions)} samples have no question, the first is {bare[0]}")
    outside = [question for question in questions if not isinstance(question.image, bytes)]
    places = [names(question) for question in outside]
    bare = [question.id for question, (first, *_) in zip(outside, places, strict=True) if not first]
    if bare:
        raise ValueError(f"{data}: {len(bare)} questions name no picture, the first is {bare[0]}")
    folders = [images] if images else [data.parent / "images", data.parent]
    tried = ((folder / name, at) for at, name in enumerate(places[0] if places else ()) for folder in folders)
    at = next((at for path, at in tried if path.is_file()), 0)
    found = iter(find_images(data, images, [place[at] for place in places]))
    return [
        Example(
            id=question.id,
            prompt=question.text if question.text.endswith(suffix) else question.text + suffix,
            images=(question.image,) if isinstance(question.image, bytes) else next(found),
            references=question.answers,
        )
        for question in questions
    ]


def by_id(questions: Sequence[Question], path: Path, only: Collection[str] | None = None) -> dict[str, Question]:
    """The questions that count, each with an answer to compare with.

    Args:
        path: of their file, for messages.
        only: as of `Task.score`.
    Raises:
        ValueError: there are none, two have the same id, or one has no answer.
    """
    found = {question.id: question for question in questions}
    if len(found) < len(questions):
        [(double, _)] = Counter(question.id for question in questions).most_common(1)
        raise ValueError(f"{path} has question {double} twice: an answer could not be matched to it")
    found = only_these(found, only)
    if not found:
        raise ValueError(f"{path} has no questions")
    bare = [question.id for question in found.values() if not question.answers]
    if bare:
        raise ValueError(
            f"{path}: {len(bare)} of {len(found)} questions have no answer to compare with, the first is {bare[0]}. "
            "Of a split whose answers are not public, --submission writes what the benchmark's server takes"
        )
    return found


def judged(
    questions: Mapping[str, Question],
    found: Predictions,
    judge: Callable[[str, Question], tuple[float, str]],
    *,
    metric: str,
    scales: Mapping[str, str],
    scorer: Mapping[str, str],
    scale: float = 100.0,
    is_right_or_wrong: bool = False,
) -> Scores:
    """Scores whose metric is the mean of what `judge` gives.

    Args:
        questions: by id, as of `by_id`.
        judge: of an answer and its question how right it is, 0 to 1, and what it read in the answer.
        scale: that the metric is times.
    """
    samples = []
    kinds: dict[str, dict[str, list[float]]] = {}
    for name, answer in found.answers.items():
        question = questions[name]
        value, parsed = judge(answer, question)
        group = next(iter(question.groups.values()), ("",))[0]
        samples.append(
            Sample(id=name, score=value, answer=answer, parsed=parsed, references=question.answers, group=group)
        )
        for kind, names in question.groups.items():
            for part in names:
                kinds.setdefault(kind, {}).setdefault(part, []).append(value)
    values = [sample.score for sample in samples]
    return Scores(
        metric=metric,
        metrics={metric: scale * sum(values) / len(values)},
        scales=scales,
        samples=samples,
        statistics={metric: mean(values, scale)},
        groups={
            kind: {
                part: Group(score=scale * sum(row) / len(row), num_samples=len(row))
                for part, row in sorted(
                    parts.items(), key=lambda item: (int(item[0]) if item[0].isdecimal() else 0, item)
                )
            }
            for kind, parts in kinds.items()
        },
        counts=found.counts,
        is_right_or_wrong=is_right_or_wrong,
        scorer=scorer,
        notes=found.notes,
    )


def with_parts(scores: Scores, parts: Mapping[str, Callable[[Sample], bool]], scale: float = 100.0) -> Scores:
    """Scores that also have, by name, the means over those samples that `parts` picks, where there are any."""
    metrics, statistics = dict(scores.metrics), dict(scores.statistics)
    for name, is_in in parts.items():
        values = [sample.score for sample in scores.samples if is_in(sample)]
        if values:
            rows = [(sample.score * is_in(sample), float(is_in(sample))) for sample in scores.samples]
            metrics[name] = scale * sum(values) / len(values)
            statistics[name] = Statistic(rows=rows, value=lambda sums: scale * sums[..., 0] / sums[..., 1])
    return replace(scores, metrics=metrics, statistics=statistics)


def submit(
    predictions: Path,
    references: Path,
    questions: Sequence[Question],
    output: Path,
    row: Callable[[Question, str], Any],
    formats: Sequence[tuple[str, str]] = ANSWER_FORMATS,
    missing: Literal["refuse", "empty"] = "refuse",
) -> None:
    """Write a JSON list of one row a question, whole or not at all; what was found in the answers is told.

    Raises:
        ValueError: a file is unreadable, or the output cannot be written.
        EvaluationError: the predictions are not those of the questions.
    """
    ids = [question.id for question in questions]
    found = load_predictions(predictions, ids, references, formats=formats, missing=missing)
    for note in found.notes:
        print(f"mmcore evaluate: {note}", file=sys.stderr)
    rows = [row(question, found.answers[question.id]) for question in questions]
    write_whole(output, (json.dumps(rows, ensure_ascii=False) + "\n").encode())


def number(name: str) -> int | str:
    """An id as servers take it: a number where it is one."""
    return int(name) if name.isdecimal() else name
