"""MMMU: college questions of 30 subjects with pictures among the words, scored as MMMU's own scripts do.

Source: MMMU-Benchmark/MMMU, mmmu/ at commit bb0b95a; `mmcore.evaluation.metrics.mmmu` has how answers are read. The
score is the share of right answers, of all questions alike. A response that names no option is given one at random:
one stream (seed 42) draws for all subjects, in their alphabetical order, and within one in the order of the
predictions, so that the score is the official one to the last digit. `fallback` has two ways without chance.

Predictions come in three forms, which differ in what they hold:

- Rows of responses, which are parsed: JSON lines of `mmcore generate` (id, answer), of Megatron-LM (sample_id,
  prediction), of LLaVA (question_id, text), or MMMU's rows (id, response, all_choices, index2ans).
- A folder with such rows in SUBJECT/output.json, MMMU's own form, scored as main_parse_and_eval.py does.
- One JSON object of ids to answers, MMMU's total_val_output.json, whose letters are parsed already: as in
  main_eval_only.py they are compared as they are. Open answers are parsed in any form.

References are answer_dict_val.json, or what also holds the options: the data set's Parquet files, one or a folder of
them, of which `split` counts; or a folder of output.json, whose rows hold the right answers too. To parse takes the
options: those of the prediction's own row count, then those of the references. Where neither has them, as with JSON
lines against answer_dict_val.json, letters are read all the same, the options being A to D, or to the right one; but
none is found by its text, and what is drawn may differ. Notes and counts say how many answers that concerns.

The official scripts score what is there, be it one subject; here a missing answer is refused.
"""

import json
import random
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.constants import IMAGE_TAG
from mmcore.evaluation.confidence import mean
from mmcore.evaluation.metrics.mmmu import is_right, parse_choice, parse_choice_like_megatron, parse_open
from mmcore.evaluation.mmmu_files import (
    DOMAIN_OF,
    Choices,
    Question,
    Responses,
    load_questions,
    load_responses,
    question_rows,
    read_question,
)
from mmcore.evaluation.predictions import Predictions, match_answers
from mmcore.evaluation.scores import Group, Sample, Scores, write_whole
from mmcore.evaluation.task import Example, Options, only_these

METRIC = "accuracy"
SCALES = {METRIC: "percent"}
OPTIONS = {
    # What a response that names no option counts for: an option drawn at random, the first one, or wrong.
    "fallback": ("random", "first", "none"),
    # MMMU's own, or Megatron-LM's, which also reads "A)" and \boxed{A} and takes the first option for want of any.
    "parser": ("official", "megatron"),
    # Of a folder of the data set's files.
    "split": ("validation", "test", "dev"),
    # Each where the question names it, as Megatron-LM's multi_image has it, or the first one alone, before all words,
    # as MMMU's run_llava.py has it.
    "pictures": ("placed", "first"),
}

# mmmu/configs/llava1.5.yaml
CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."
OPEN_PROMPT = "Answer the question using a single word or phrase."

_PLACE = re.compile(r"<image (\d)>")
_NUM_PICTURES = 7
_SEED = 42


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was read in the responses to multiple-choice questions."""

    letters: Mapping[str, str]
    """By id; "" where none was found or drawn."""
    unnamed: tuple[str, ...]
    """Whose response names no option."""
    bare: tuple[str, ...]
    """Whose options are not known."""
    fallback: str
    """What they were given: see `OPTIONS`; "none" also where letters are parsed already."""


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; the pictures are in the data set's own Parquet files."""
    rows = question_rows(data, options["split"], "questions")
    return [_example(row, where, is_placed=options["pictures"] == "placed") for where, row in rows]


def _example(row: Any, where: str, *, is_placed: bool) -> Example:
    question = read_question(row, where)
    if not isinstance(row.get("question"), str):
        raise ValueError(f"{where} holds no question: give the data set's Parquet files")
    if question.is_open:
        prompt = f"{row['question']}\n{OPEN_PROMPT}"
    else:
        lines = "".join(f"({letter}) {text}\n" for letter, text in question.choices.items())
        prompt = f"{row['question']}\n{lines}\n{CHOICE_PROMPT}"
    pictures = {number: _bytes(row.get(f"image_{number}"), where) for number in range(1, _NUM_PICTURES + 1)}
    named = [int(number) for number in _PLACE.findall(prompt)]
    if is_placed and named:
        prompt = _PLACE.sub(IMAGE_TAG, prompt)
    else:
        named = [number for number, picture in pictures.items() if picture][: None if is_placed else 1]
    images = []
    for number in named:
        picture = pictures.get(number)
        if picture is None:
            raise ValueError(f"{where}: question {question.id} names picture {number}, which it does not have")
        images.append(picture)
    return Example(
        id=question.id,
        prompt=prompt,
        images=tuple(images),
        references=question.answers,
        choices=tuple(question.choices),
    )


def _bytes(cell: Any, where: str) -> bytes | None:
    """A picture of a Parquet file: its contents, or a struct of them and a name."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if content is None or isinstance(content, bytes):
        return content
    raise ValueError(f"{where}: a picture is bytes of a Parquet file, not {content!r:.80}")


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    questions = only_these(load_questions(references, options["split"]), only)
    hidden = [name for name, question in questions.items() if not question.answers]
    if hidden:
        raise ValueError(
            f"{references}: the answers to {len(hidden)} of {len(questions)} questions are not public, the first is "
            f"{hidden[0]}: write a file for MMMU's server by --submission, or score another split"
        )
    responses, found, reading = _read(predictions, references, questions, options)
    samples = [_sample(questions[name], answer, reading) for name, answer in found.answers.items()]
    right = {sample.id for sample in samples if sample.score == 1}
    lucky = len(right.intersection(reading.unnamed)) if reading.fallback != "none" else 0
    num_given = 0 if reading.fallback == "none" else len(reading.unnamed)
    return Scores(
        metric=METRIC,
        metrics={METRIC: _percent(samples)},
        scales=SCALES,
        statistics={METRIC: mean([sample.score for sample in samples])},
        samples=samples,
        is_right_or_wrong=True,
        groups=_groups(samples, questions),
        counts={
            **found.counts,
            "fallback": num_given,
            "unparsed": len(reading.unnamed) - num_given,
            "without_options": len(reading.bare),
        },
        scorer={"rule": "MMMU-Benchmark/MMMU at bb0b95a", "parser": options["parser"], "fallback": reading.fallback},
        notes=(*found.notes, *_notes(responses, reading, f"; of these {lucky} are right")),
    )


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """Write what MMMU's server takes, of any split: a JSON object of ids to letters, or to responses if open.

    Raises:
        ValueError: a file is missing, unreadable or in another format.
        EvaluationError: the files do not belong together.
    """
    questions = load_questions(references, options["split"])
    responses, found, reading = _read(predictions, references, questions, options)
    answers = {name: reading.letters.get(name, answer) for name, answer in found.answers.items()}
    write_whole(output, (json.dumps(answers, indent=4) + "\n").encode())
    for note in (*found.notes, *_notes(responses, reading)):
        print(f"mmcore evaluate: {note}", file=sys.stderr)


def _read(
    predictions: Path, references: Path, questions: Mapping[str, Question], options: Options
) -> tuple[Responses, Predictions, Reading]:
    responses = load_responses(predictions)
    found = match_answers(
        predictions,
        responses.texts,
        list(questions),
        references,
        num_repeated=responses.num_repeated,
        contradictory=responses.contradictory,
    )
    return responses, found, _read_letters(responses, questions, options)


def _read_letters(responses: Responses, questions: Mapping[str, Question], options: Options) -> Reading:
    is_megatron = options["parser"] == "megatron"
    if is_megatron and options["fallback"] == "none":
        raise ValueError("--options parser=megatron takes the first option for want of any: leave fallback=none out")
    parse = parse_choice_like_megatron if is_megatron else parse_choice
    fallback = "none" if responses.is_parsed else "first" if is_megatron else options["fallback"]
    stream = random.Random(_SEED)
    letters: dict[str, str] = {}
    unnamed, bare = [], []
    # Sorting is stable: within a subject the file's order stays.
    for name in sorted(responses.texts, key=lambda name: questions[name].subject):
        question, text = questions[name], responses.texts[name]
        if question.is_open:
            continue
        if responses.is_parsed:
            letters[name] = text
            if not _is_letter(text):
                unnamed.append(name)
            continue
        choices = responses.choices.get(name) or question.choices
        if not choices:
            bare.append(name)
            choices = _likely_choices(question, text)
        letter = parse(text, choices)
        if letter is None:
            unnamed.append(name)
            if fallback == "random":
                letter = stream.choice(list(choices))
            else:
                letter = next(iter(choices)) if fallback == "first" else ""
        letters[name] = letter
    return Reading(letters=letters, unnamed=tuple(unnamed), bare=tuple(bare), fallback=fallback)


def _likely_choices(question: Question, text: str) -> Choices:
    """Options that are not known: A to D, or to the right letter, or to the one that is the whole response."""
    given = [letter for letter in (*question.answers, text.strip(" ().")) if _is_letter(letter)]
    return {chr(code): None for code in range(ord("A"), ord(max("D", *given)) + 1)}


def _is_letter(text: str) -> bool:
    return len(text) == 1 and "A" <= text <= "Z"


def _sample(question: Question, answer: str, reading: Reading) -> Sample:
    if question.is_open:
        values = parse_open(answer)
        parsed, right = " | ".join(map(str, values)), is_right(values, question.answers)
    else:
        parsed = reading.letters[question.id]
        right = parsed in question.answers
    return Sample(
        id=question.id,
        answer=answer,
        parsed=parsed,
        references=question.answers,
        score=float(right),
        group=question.subject,
    )


def _groups(samples: Iterable[Sample], questions: Mapping[str, Question]) -> dict[str, dict[str, Group]]:
    """Scores by domain, by subject, and by kind of question, each in alphabetical order."""
    parts: dict[str, dict[str, list[Sample]]] = {"domain": {}, "subject": {}, "question_type": {}}
    for sample in samples:
        kind = "open" if questions[sample.id].is_open else "multiple-choice"
        for by, name in (("domain", DOMAIN_OF[sample.group]), ("subject", sample.group), ("question_type", kind)):
            parts[by].setdefault(name, []).append(sample)
    return {
        by: {name: Group(score=_percent(part), num_samples=len(part)) for name, part in sorted(named.items())}
        for by, named in parts.items()
    }


def _percent(samples: Collection[Sample]) -> float:
    return 100 * sum(sample.score for sample in samples) / len(samples)


def _notes(responses: Responses, reading: Reading, lucky: str = "") -> list[str]:
    of_all = f"of {len(reading.letters)} multiple-choice answers"
    notes = []
    if responses.is_parsed:
        notes.append(
            "the predictions are one JSON object, whose letters are taken for parsed already, as MMMU's "
            "main_eval_only.py does: responses that are to be parsed come as JSON lines, or in SUBJECT/output.json"
        )
    if reading.unnamed:
        found = f"{len(reading.unnamed)} {of_all} name no option ({', '.join(reading.unnamed[:5])}"
        found += ", ...)" if len(reading.unnamed) > 5 else ")"
        how = {
            "random": f"each is given one at random (seed {_SEED}, the official order){lucky}",
            "first": f"each is given the first one{lucky}",
            "none": "they count as wrong",
        }
        notes.append(f"{found}: {how[reading.fallback]}")
    if reading.bare:
        bare = len(set(reading.bare).intersection(reading.unnamed))
        notes.append(
            f"neither file holds the options of {len(reading.bare)} {of_all}: {len(reading.bare) - bare} of them name "
            f"a letter, which needs no more; the texts of options cannot be looked for in the other {bare}, nor is "
            "it known how many there are to draw from. For the official rule throughout, give the data set's Parquet "
            "files as --references, or predictions with all_choices and index2ans"
        )
    return notes
