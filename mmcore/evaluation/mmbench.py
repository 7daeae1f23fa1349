"""MMBench and MMBench-CN: questions asked once for every order of their options, right only if right each time.

Source: open-compass/VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py (mcq_circular_eval) and image_mcq.py at commit
e8e78f0, without a language model ("exact_matching"): an answer that the rules of `metrics.options` cannot read is
wrong, and counted as unparsed. The row `index` = g + k * 1000000 is the k-th pass of question g. A question has as
many passes as it has rows, which can be fewer than options. `circular` is the share of questions that are right in
all, `vanilla` of those right in the first. As officially, rows of a question that has no first pass do not count.

Cells are text as the file has it: an option "None" or "NA" is one, where VLMEvalKit's tables lose it. Of files that
went through them, and so lost the right option's text, its letter counts all the same.

References are the official table, TSV or Parquet, with base64 pictures, a picture's cell being that of another row's
index where it repeats; or any table of rows that hold index, question, A to D, answer. Predictions are a table or
JSON lines of index and prediction, LLaVA's of question_id and text, ours of id and answer, or one JSON object of ids to
answers. The official scorer takes the predicted rows for all that there are; here a missing one is refused.
"""

import base64
import binascii
import io
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmcore.evaluation.confidence import mean
from mmcore.evaluation.metrics.options import infer_option
from mmcore.evaluation.predictions import Predictions, match_answers
from mmcore.evaluation.scores import EvaluationError, Group, Sample, Scores, write_whole
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options, find_images, only_these

METRIC = "circular"
SCALES = {METRIC: "percent", "vanilla": "percent"}
OPTIONS = {
    # Of the prompt's last line: auto goes by the questions' script.
    "language": ("auto", "en", "cn"),
}

# LLaVA-1.5's: haotian-liu/LLaVA, llava/eval/model_vqa_mmbench.py at commit c121f04, --single-pred-prompt.
PROMPTS = {"en": "Answer with the option's letter from the given choices directly.", "cn": "请直接回答选项字母。"}

# Columns of the row and of the answer, in lower case.
FORMATS = (("index", "prediction"), ("id", "prediction"), ("id", "answer"), ("question_id", "text"))
PASS = 1_000_000
_KINDS = ("l2-category", "category")
_CHINESE = re.compile("[\u4e00-\u9fff]")
_LONGEST_NAME = 64  # characters of a picture's cell that is none, as VLMEvalKit has it
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")  # in XML, and so in XLSX


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question in one order of its options."""

    index: int
    where: str
    row: Mapping[str, Any]
    """Its cells by column; names in lower case, but for options."""
    choices: Mapping[str, str]
    answer: str
    """Its letter; "" where it is not public."""

    def text(self, name: str) -> str:
        """A cell; "" where it is absent or says that there is nothing."""
        return _text(self.row.get(name))


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`: every row is asked, in every order that the file has."""
    rows = load_rows(data)
    language = options["language"]
    if language == "auto":
        num_chinese = sum(bool(_CHINESE.search(asked.text("question"))) for asked in rows.values())
        language = "cn" if 2 * num_chinese > len(rows) else "en"
    return [
        Example(
            id=name,
            prompt=_prompt(asked, PROMPTS[language]),
            images=shown,
            references=(asked.answer,) if asked.answer else (),
            choices=tuple(asked.choices),
        )
        for (name, asked), shown in zip(rows.items(), _pictures(rows, data, images), strict=True)
    ]


def _prompt(asked: Asked, last: str) -> str:
    hint = asked.text("hint")
    options = [f"{letter}. {text}" for letter, text in asked.choices.items()]
    return "\n".join([*([hint] if hint.lower() != "none" and hint else []), asked.text("question"), *options, last])


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    rows = only_these(load_rows(references), only)
    hidden = [name for name, asked in rows.items() if not asked.answer]
    if hidden:
        raise ValueError(
            f"{references}: {len(hidden)} of {len(rows)} rows have no answer, the first is {hidden[0]}: write a file "
            "for MMBench's server by --submission, or score the dev split"
        )
    found = _match(predictions, rows, references)
    samples = {asked.index: _sample(asked, found.answers[name]) for name, asked in rows.items()}
    passes: dict[int, list[float]] = {index: [] for index in samples if index < PASS}
    left_out = [index for index in samples if index % PASS not in passes]
    if not passes:
        raise EvaluationError(f"{references} has no question's first pass, an index below {PASS}: nothing to score")
    for index, sample in samples.items():
        if index % PASS in passes:
            passes[index % PASS].append(sample.score)
    circular = {index: float(min(scores)) for index, scores in passes.items()}
    vanilla = [samples[index].score for index in passes]
    notes = list(found.notes)
    unparsed = [sample for sample in samples.values() if not sample.parsed]
    if unparsed:
        notes.append(
            f"{len(unparsed)} of {len(samples)} answers name no option by the rules (the first is of row "
            f"{unparsed[0].id}): they count as wrong, where the official leaderboard asks a language model"
        )
    if left_out:
        notes.append(f"{len(left_out)} rows do not count: questions without a first pass, such as {left_out[0]}'s")
    if len(passes) + len(left_out) == len(rows):
        notes.append("no question is asked in a second order: circular is the same as vanilla")
    return Scores(
        metric=METRIC,
        metrics={METRIC: 100 * sum(circular.values()) / len(circular), "vanilla": 100 * sum(vanilla) / len(vanilla)},
        scales=SCALES,
        statistics={METRIC: mean(list(circular.values())), "vanilla": mean(vanilla)},
        samples=list(samples.values()),
        num_samples=len(circular),
        num_correct=int(sum(circular.values())),
        is_right_or_wrong=True,
        groups=_groups(rows, circular),
        counts={**found.counts, "unparsed": len(unparsed), "without_first_pass": len(left_out)},
        scorer={"rule": "CircularEval, open-compass/VLMEvalKit at e8e78f0, exact_matching"},
        notes=tuple(notes),
    )


def _sample(asked: Asked, answer: str) -> Sample:
    letter = infer_option(answer, asked.choices)
    return Sample(
        id=str(asked.index),
        answer=answer,
        parsed=letter or "",
        references=(asked.answer,),
        score=float(letter == asked.answer),
        group=asked.text("category"),
    )


def _groups(rows: Mapping[str, Asked], circular: Mapping[int, float]) -> dict[str, dict[str, Group]]:
    """Circular accuracy by the first pass's categories, where the file has them."""
    groups: dict[str, dict[str, Group]] = {}
    for kind in _KINDS:
        parts: dict[str, list[float]] = {}
        for index, right in circular.items():
            if name := rows[str(index)].text(kind):
                parts.setdefault(name, []).append(100 * right)
        if parts:
            groups[kind] = {
                name: Group(score=sum(part) / len(part), num_samples=len(part)) for name, part in sorted(parts.items())
            }
    return groups


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """Write what MMBench's server takes: XLSX of the official table's columns but the pictures, and `prediction`.

    Source: open-compass/VLMEvalKit, scripts/mmb_eval_gradio.py at commit e8e78f0; its own outputs look the same.

    Raises:
        ValueError: a file is missing, unreadable or in another format, or the output is no .xlsx.
        EvaluationError: the files do not belong together.
    """
    if output.suffix.lower() != ".xlsx":
        raise ValueError(f"--submission {output}: MMBench's server takes a file whose name ends with .xlsx")
    import openpyxl
    from openpyxl.cell import WriteOnlyCell

    rows = load_rows(references)
    found = _match(predictions, rows, references)
    left_out = {"index", "image", "image_path", "prediction"}
    columns = [name for name in next(iter(rows.values())).row if name not in left_out]
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["index", *columns, "prediction"])
    for name, asked in rows.items():
        cells: list[Any] = [asked.index]
        for value in [*map(asked.text, columns), found.answers[name]]:
            cell = WriteOnlyCell(sheet, _ILLEGAL.sub("", value))
            if cell.data_type == "f":  # what begins with "=" is no formula
                cell.data_type = "s"
            cells.append(cell)
        sheet.append(cells)
    stream = io.BytesIO()
    book.save(stream)
    write_whole(output, stream.getvalue())
    for note in found.notes:
        print(f"mmcore evaluate: {note}", file=sys.stderr)


def load_rows(path: Path) -> dict[str, Asked]:
    """Rows by their index as text, in the file's order.

    Raises:
        ValueError: not MMBench's columns, or an index twice.
    """
    rows: dict[str, Asked] = {}
    for where, row in _cells(path, "references"):
        if not {"index", "question", "A"} <= row.keys():
            raise ValueError(f"{where} has {_columns(row)}: MMBench's rows have index, question, options A, B, ...")
        index, answer = _index(row["index"], where), _text(row.get("answer"))
        texts = {letter: _text(row.get(letter)) for letter in ascii_uppercase}
        choices = {letter: text for letter, text in texts.items() if text or letter == answer}
        if answer and answer not in choices:
            raise ValueError(f"{where}: the answer {answer!r} is no option's letter")
        if str(index) in rows:
            raise ValueError(f"{path} has index {index} twice")
        rows[str(index)] = Asked(index=index, where=where, row=row, choices=choices, answer=answer)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _match(predictions: Path, rows: Mapping[str, Asked], references: Path) -> Predictions:
    answers: dict[str, str] = {}
    contradictory: dict[str, None] = {}
    num_repeated = 0
    for where, row in _cells(predictions, "predictions"):
        columns = next((pair for pair in FORMATS if row.keys() >= set(pair)), None)
        if columns is None and where != str(predictions):
            wanted = ", or ".join(" and ".join(pair) for pair in FORMATS)
            raise ValueError(f"{where}: a prediction has {wanted}; this one has {_columns(row)}")
        # Without such columns it is one JSON object, of ids to answers.
        for index, value in [(row[columns[0]], row[columns[1]])] if columns else row.items():
            name, answer = str(_index(index, where)), _text(value, keep=True)
            if name not in answers:
                answers[name] = answer
            elif answers[name] == answer:
                num_repeated += 1
            else:
                contradictory[name] = None
    return match_answers(
        predictions, answers, list(rows), references, num_repeated=num_repeated, contradictory=list(contradictory)
    )


def _cells(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table; a column's name in lower case, where it is no option's letter."""
    for where, row in read_rows(path, what):
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {row!r:.80}, where {what} of MMBench are rows with columns")
        yield where, {name if name in ascii_uppercase else name.lower(): value for name, value in row.items() if name}


def _columns(row: Mapping[str, Any], limit: int = 12) -> str:
    return ", ".join([*row][:limit]) + (", ..." if len(row) > limit else "")


def _index(value: Any, where: str) -> int:
    """An index: tables hold 1 as "1", and as 1.0 too."""
    try:
        if not isinstance(value, bool) and (number := float(value)) == int(number) >= 0:
            return int(number)
    except (OverflowError, TypeError, ValueError):
        pass
    raise ValueError(f"{where}: an index of MMBench is a whole number, not {value!r:.80}")


def _text(value: Any, *, keep: bool = False) -> str:
    """A cell as text. What pandas writes for nothing is nothing, but in an answer (`keep`)."""
    text = "" if value is None or value != value else str(value)
    return "" if text == "nan" and not keep else text


def _pictures(rows: Mapping[str, Asked], data: Path, images: Path | None) -> list[tuple[Path | bytes, ...]]:
    """One of each row."""
    cells = {asked.index: asked.row.get("image") or asked.row.get("image_path") for asked in rows.values()}
    pictures = [_picture(asked, cells) for asked in rows.values()]
    paths = find_images(data, images, [picture if isinstance(picture, str) else None for picture in pictures])
    return [(picture,) if isinstance(picture, bytes) else path for picture, path in zip(pictures, paths, strict=True)]


def _picture(asked: Asked, cells: Mapping[int, Any]) -> str | bytes:
    """Contents, or the name of a file."""
    cell = cells[asked.index]
    if isinstance(cell, str | int) and str(cell).isdecimal():
        cell = cells.get(int(cell))
    if isinstance(cell, dict):  # Parquet's
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and len(cell) > _LONGEST_NAME:
        try:
            cell = base64.b64decode(cell, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{asked.where}: the picture is not base64: {error}") from None
    if not (isinstance(cell, str | bytes) and cell) or (isinstance(cell, str) and cell.isdecimal()):
        raise ValueError(f"{asked.where} (index {asked.index}) has no picture")
    return cell
