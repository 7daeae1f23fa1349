"""Questions of multiple choice: the rows and pictures of the tables that they are published in, and how LLaVA asks
them.
"""

import base64
import binascii
import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcore.evaluation.tables import Row, read_rows
from mmcore.evaluation.task import Example, find_images, sample_id

LETTERS = string.ascii_uppercase

# LLaVA, docs/Evaluation.md at commit c121f04: option-only and short answers.
INSTRUCTION = "Answer with the option's letter from the given choices directly."
SHORT_INSTRUCTION = "Answer the question using a single word or phrase."

_NAME_LENGTH = 64  # up to which a cell without a dot names a picture: base64 of one is longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row of a benchmark, whatever file it is from."""

    id: str
    question: str
    """With its context, without its choices."""
    choices: tuple[str, ...] = ()
    answer: str
    """Letter of the right choice, or the right text where there are no letters; "" where it is not public."""
    pictures: tuple[str | bytes, ...] = ()
    """Names, or contents."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What it belongs to, such as "subject": ("biology",)."""

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.choices)]


def lettered(question: str, choices: Sequence[str]) -> str:
    """The question with its choices, a line each, as LLaVA asks it (docs/Evaluation.md at commit c121f04)."""
    rows = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *rows, INSTRUCTION])


def read_shards(path: Path, what: str, split: str = "") -> Iterator[Row]:
    """Rows of a file, or of all Parquet files in a folder, in the order of their names.

    Args:
        what: see `read_rows`.
        split: of a folder's files only those that begin with it, if there are any.
    Raises:
        ValueError: the folder has none, or as of `read_rows`.
    """
    if not path.is_dir():
        yield from read_rows(path, what)
        return
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{what} {path} is a folder without Parquet files: name the file")
    for file in [file for file in files if file.name.startswith(split)] or files:
        yield from read_rows(file, what)


def table_questions(rows: Iterator[Row], *, pictures: bool = True) -> list[Question]:
    """Questions out of the tables of lmms-lab and of VLMEvalKit, and of lists of the same columns.

    Columns: question; choices in options, in A, B, ... or in choice_a, choice_b, ...; answer (a letter, the number of
    an option from 0, or a text); perhaps index or question_id (else the row's number counts, from 0), hint, image (of
    VLMEvalKit also the index of the row that has it) and category.

    Args:
        pictures: whether they are kept; they take memory, and no score needs them.
    Raises:
        ValueError: a column is missing, or an id is there twice.
    """
    found: list[Question] = []
    seen: dict[str | bytes, tuple[str | bytes, ...]] = {}
    for number, (where, row) in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise ValueError(f"{where} has no question: {describe(row)}")
        name = sample_id(next((row[key] for key in ("index", "question_id", "id") if key in row), number), where)
        options = row.get("options")
        choices = [*options] if options is not None else _columns(row)
        answer = str(row.get("answer", "")).strip()
        if options is not None and answer.isdigit():
            answer = LETTERS[int(answer)]
        hint = str(row.get("hint") or "")
        shown = cells(row.get("image")) if pictures else ()
        # A picture that several rows share stands in one of them, and the others name that one's index.
        seen[name] = shown = seen.get(shown[0], shown) if len(shown) == 1 and isinstance(shown[0], str) else shown
        found.append(
            Question(
                id=name,
                question=f"{hint}\n{row['question'].strip()}" if hint else row["question"].strip(),
                choices=tuple(str(choice) for choice in choices),
                answer=answer,
                pictures=shown,
                groups={"category": (str(row["category"]),)} if row.get("category") else {},
            )
        )
    return unique(found)


def _columns(row: Mapping[str, Any]) -> list[str]:
    """Choices in columns of their own, as far as they are filled."""
    for names in (tuple(LETTERS), tuple(f"choice_{letter.lower()}" for letter in LETTERS)):
        if names[0] in row:
            found = [row.get(name) for name in names]
            return list(map(str, itertools.takewhile(lambda choice: choice not in (None, ""), found)))
    return []


def unique(questions: list[Question]) -> list[Question]:
    """The questions, if no id is there twice and there are any.

    Raises:
        ValueError: otherwise.
    """
    if not questions:
        raise ValueError("there are no questions in the references")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"question {question.id} is there twice: an answer could not be matched to it")
        seen.add(question.id)
    return questions


def describe(row: Any) -> str:
    """What a row is, for messages."""
    return f"it has {', '.join(sorted(map(str, row)))}" if isinstance(row, dict) else f"it is {row!r:.80}"


def cells(value: Any) -> tuple[str | bytes, ...]:
    """Pictures of a table's cell: names or contents.

    A cell is a name, contents, base64 text, what `datasets` stores (`{"bytes": ..., "path": ...}`), or a list of these.
    """
    if isinstance(value, (list, tuple)):
        return tuple(picture for item in value for picture in cells(item))
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        return ()
    if isinstance(value, str) and "." not in value and len(value) > _NAME_LENGTH:
        try:
            return (base64.b64decode(value, validate=True),)
        except binascii.Error:
            return (value,)
    return (value if isinstance(value, bytes) else str(value),)


def named(data: Path, images: Path | None, *namings: Sequence[str | None]) -> Sequence[str | None]:
    """Of several ways to name the same pictures, the one whose first picture is there; else the first way."""
    root = data if data.is_dir() else data.parent
    for folder in [images] if images else [root / "images", root]:
        for names in namings:
            first = next((name for name in names if name), None)
            if first and (folder / first).is_file():
                return names
    return namings[0]


def find_pictures(
    data: Path, images: Path | None, pictures: Sequence[Sequence[str | bytes]]
) -> list[tuple[Path | bytes, ...]]:
    """Paths of the pictures that are names, beside those that are contents; arguments as of `find_images`.

    Raises:
        ValueError: one is not there.
    """
    flat = [picture for row in pictures for picture in row]
    if data.is_dir() and not images:
        first = next((picture for picture in flat if isinstance(picture, str)), "")
        images = next((folder for folder in (data / "images", data) if (folder / first).is_file()), data / "images")
    paths = iter(find_images(data, images, [picture if isinstance(picture, str) else None for picture in flat]))
    found = [(picture,) if isinstance(picture, bytes) else path for picture, path in zip(flat, paths, strict=True)]
    ends = iter(found)
    return [tuple(one for _ in row for one in next(ends)) for row in pictures]


def as_examples(data: Path, images: Path | None, questions: Sequence[Question]) -> list[Example]:
    """The questions as LLaVA asks them; those without choices as they stand."""
    paths = find_pictures(data, images, [question.pictures for question in questions])
    return [
        Example(
            id=question.id,
            prompt=lettered(question.question, question.choices) if question.choices else question.question,
            images=pictures,
            references=(question.answer,) if question.answer else (),
            choices=tuple(question.letters),
        )
        for question, pictures in zip(questions, paths, strict=True)
    ]
