"""MMMU's files: questions with what is right, and predictions.

Sources: the data sets MMMU/MMMU and lmms-lab/MMMU on Hugging Face (Parquet); MMMU-Benchmark/MMMU, mmmu/README.md at
commit bb0b95a (answer_dict_val.json, SUBJECT/output.json, total_val_output.json).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.evaluation.tables import Row, read_rows
from mmcore.evaluation.task import sample_id
from mmcore.foreign import parse_literal

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}

# Columns of the id and of the response. MMMU's own rows come first: their `answer` is the right one.
FORMATS = (
    ("id", "response"),
    ("sample_id", "prediction"),
    ("id", "prediction"),
    ("id", "answer"),
    ("question_id", "text"),
)

Choices = Mapping[str, str | None]
"""Text of each option by its letter, None where it is not known."""

_ID = re.compile(r"[a-z]+_(.+)_\d+")
_HIDDEN = "?"  # as an answer: the test split's


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What has to be known of a question to score its answer."""

    id: str
    subject: str
    is_open: bool
    answers: tuple[str, ...]
    """Letters or texts, any of which is right; none where they are not public."""
    choices: Choices
    """Empty if the question is open, or where the file does not hold them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Predictions as they are."""

    texts: Mapping[str, str]
    """By id, in the order in which the official script meets those of a subject."""
    choices: Mapping[str, Choices]
    """Of those rows that hold them."""
    is_parsed: bool
    """Whether letters are answers already, not to be parsed."""
    num_repeated: int
    contradictory: tuple[str, ...]


def load_questions(path: Path, split: str) -> dict[str, Question]:
    """Questions by id, in the file's order.

    Args:
        split: that counts in a folder of the data set's files.
    Raises:
        ValueError: in none of the forms, or a question twice.
    """
    questions: dict[str, Question] = {}
    for where, row in question_rows(path, split, "references"):
        question = read_question(row, where)
        if question.id in questions:
            raise ValueError(f"{path} has question {question.id} twice")
        questions[question.id] = question
    if not questions:
        raise ValueError(f"{path} holds no questions of MMMU")
    return questions


def question_rows(path: Path, split: str, what: str) -> Iterator[Row]:
    """Rows of id, question_type, answer and, but for answer_dict_val.json, options or all_choices and index2ans.

    Raises:
        ValueError: missing, unreadable, or a folder that holds neither the data set's files nor output.json.
    """
    if path.is_dir():
        files = sorted(path.rglob(f"{split}*.parquet"))
        yield from (row for file in files for row in read_rows(file, what))
        if not files:
            yield from _output_rows(path, what, f"{split}*.parquet or SUBJECT/output.json")
        return
    for where, row in read_rows(path, what):
        if isinstance(row, dict) and "id" not in row and where == str(path):  # answer_dict_val.json
            for name, entry in row.items():
                yield f"{where} {name}", {"id": name, **entry} if isinstance(entry, dict) else entry
        else:
            yield where, row


def read_question(row: Any, where: str) -> Question:
    """A row of `question_rows`.

    Raises:
        ValueError: it is none.
    """
    if not (
        isinstance(row, dict) and {"id", "question_type"} <= row.keys() and {"answer", "ground_truth"} & row.keys()
    ):
        raise ValueError(f"{where} is no question of MMMU, which has id, question_type and answer (or ground_truth)")
    name = sample_id(row["id"], where)
    match = _ID.fullmatch(name)
    if match is None or match[1] not in DOMAIN_OF:
        raise ValueError(f"{where}: id {name} names no subject of MMMU, as validation_Accounting_1 does")
    # The official scripts, too, take all that is not this for open.
    is_open = row["question_type"] != "multiple-choice"
    answer = row.get("ground_truth", row.get("answer"))
    if is_open and isinstance(answer, str) and answer.startswith("["):  # the data set has lists as text
        answer = _literal_list(answer) or answer
    answers = answer if isinstance(answer, list) else [] if answer in (None, _HIDDEN) else [answer]
    choices = {} if is_open else read_choices(row) or dict(enumerate_options(row, where))
    return Question(id=name, subject=match[1], is_open=is_open, answers=tuple(map(str, answers)), choices=choices)


def read_choices(row: Mapping[str, Any]) -> Choices:
    """Options of a row of output.json, or of Megatron-LM's predictions; empty if it has none."""
    texts = row.get("index2ans")
    if not isinstance(texts, dict):
        return {}
    return {letter: texts.get(letter) for letter in row.get("all_choices") or texts}


def enumerate_options(row: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """(letter, text) of a data set's row, whose options are a list, or one as text.

    Raises:
        ValueError: they are neither.
    """
    options = row.get("options", [])
    texts = _literal_list(options) if isinstance(options, str) else options
    if not isinstance(texts, list):
        raise ValueError(f"{where}: options are a list, not {options!r:.80}")
    return ((chr(ord("A") + index), str(text)) for index, text in enumerate(texts))


def _literal_list(text: str) -> list[Any] | None:
    try:
        value = parse_literal(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def load_responses(path: Path) -> Responses:
    """Read predictions in any of the forms.

    Raises:
        ValueError: missing, unreadable, or in none of them.
    """
    texts: dict[str, str] = {}
    choices: dict[str, Choices] = {}
    contradictory: dict[str, None] = {}
    is_parsed, num_repeated = False, 0
    for where, row in _output_rows(path, "predictions") if path.is_dir() else read_rows(path, "predictions"):
        columns = next((pair for pair in FORMATS if isinstance(row, dict) and row.keys() >= set(pair)), None)
        if isinstance(row, dict) and where == str(path) and not {"id", "sample_id", "question_id"} & row.keys():
            is_parsed, pairs = True, list(row.items())
        elif columns is None or (columns == ("id", "answer") and "question_type" in row):  # the latter is a question
            found = f"has {', '.join(sorted(row)) or 'nothing'}" if isinstance(row, dict) else f"is {row!r:.80}"
            wanted = ", or ".join(" and ".join(pair) for pair in FORMATS)
            raise ValueError(f"{where}: a prediction has {wanted}; this one {found}")
        else:
            pairs = [(sample_id(row[columns[0]], where), row[columns[1]])]
        for name, text in pairs:
            if not isinstance(text, str | int | float) or isinstance(text, bool):
                raise ValueError(f"{where}: the answer to {name} is a text, not {text!r:.80}")
            if name not in texts:
                texts[name] = str(text)
                if not is_parsed and (own := read_choices(row)):
                    choices[name] = own
            elif texts[name] == str(text):
                num_repeated += 1
            else:
                contradictory[name] = None
    return Responses(
        texts=texts,
        choices=choices,
        is_parsed=is_parsed,
        num_repeated=num_repeated,
        contradictory=tuple(contradictory),
    )


def _output_rows(path: Path, what: str, wanted: str = "SUBJECT/output.json") -> Iterator[Row]:
    """Rows of MMMU's folder of a model's outputs.

    Raises:
        ValueError: it holds none.
    """
    files = sorted(path.glob("*/output.json"))
    if not files:
        raise ValueError(f"{what} {path} is a folder without {wanted}")
    yield from (row for file in files for row in read_rows(file, what))
