"""MathVista: mathematics in pictures, answered by a choice, a whole number, a number or a list.

Scored in two steps, as lupantech/MathVista does it at commit 53d5258. First a short answer is extracted from the
model's (evaluation/extract_answer.py): one that is a choice, or that Python reads as the number that is asked for, is
taken as it is, and everything else is given to GPT-4. Here no language model is called. An answer file of the official
pipeline already holds what it extracted, and that counts. Where it does not, rules stand in: the official quick one
(The answer is "...".), then our own: what follows "the answer is", letters in brackets, the choice that is named, the
last number or list. They are counted as `fallback`; where they find nothing, the extraction is empty, as the official
one is when GPT-4 fails, and counted as `unparsed`.

Then the extraction is normalised and compared (evaluation/calculate_score.py): of a choice the letter in brackets, or
the letter that it is, or the choice with the smallest edit distance (an empty one is nearest to the shortest choice,
and can be right by luck); a whole number by int(float()), a number rounded as the problem says, a list as its text.

How far to trust the rules: the official repository publishes 17 files of 1000 answers in words with what GPT-4
extracted. The rules judge 93 % of these answers as GPT-4's extractions do; a file's accuracy comes out 0.5 lower on
average (of 26.2) and 4.8 at most. With GPT-4's extractions all 23 published accuracies come out but for 8, which are
those of an older rule that took "2.0" for no whole number.

Problems are read from testmini.json (an object of ids to problems) and from the Parquet of AI4Math/MathVista, one file
or a folder of them. The prompt is the official query without examples, captions or detected text.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.evaluation.confidence import mean
from mmcore.evaluation.predictions import FORMATS, Predictions, load_predictions, match_answers
from mmcore.evaluation.scores import Group, Sample, Scores, write_json
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options, find_images, sample_id

METRIC = "accuracy"
SCALES = {METRIC: "percent"}
OPTIONS = {
    # How answers are read that the official code gives to GPT-4: by our rules, or not at all.
    "extraction": ("rules", "none"),
    # What an empty extraction of a multiple-choice problem is: the nearest choice, as officially, or wrong
    # (--ignore_empty_extractions of calculate_score.py).
    "empty": ("nearest", "wrong"),
}

KINDS = ("task", "context", "skills", "source", "category", "question_type", "answer_type", "grade", "language")
"""What the official scores are broken down by; a problem can need several skills."""

# The official hints (the query of every problem in data/query.json), by type of answer, of numbers by their places.
_FREE = "Please answer the question requiring {} and provide the final {}, e.g., {}, at the end."
HINTS = {
    "text": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": _FREE.format("an integer answer", "value", "1, 2, 3"),
    "float 1": _FREE.format("a floating-point number with one decimal place", "value", "1.2, 1.3, 1.4"),
    "float 2": _FREE.format("a floating-point number with two decimal places", "value", "1.23, 1.34, 1.45"),
    "list": _FREE.format("a Python list as an answer", "list", "[1, 2, 3], [1.2, 1.3, 1.4]"),
}

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
_ANNOUNCED = re.compile(r"(?:answer|result)\b[^\d\n]{0,30}?(?:\bis\b|:|=)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem; the fields are the official ones."""

    id: str
    question: str
    image: str | None
    choices: tuple[str, ...]
    unit: str
    precision: int
    """Places of a number."""
    answer: str
    """Empty where it is not public."""
    question_type: str
    answer_type: str
    metadata: Mapping[str, Any]
    row: Mapping[str, Any]
    """As the file has it, but for the picture."""
    picture: bytes | None = None

    @property
    def query(self) -> str:
        hint = f"float {self.precision}" if self.answer_type == "float" else self.answer_type
        unit = f" (Unit: {self.unit})" if self.unit else ""
        choices = "".join(f"\n({letter}) {choice}" for letter, choice in zip(letters(self), self.choices, strict=True))
        choices = f"\nChoices:{choices}" if choices else ""
        return f"Hint: {HINTS[hint]}\nQuestion: {self.question}{unit}{choices}".strip()


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; answers need not be there."""
    problems = load_problems(data)
    paths = find_images(data, images, [None if one.picture else one.image for one in problems])
    return [
        Example(
            id=problem.id,
            prompt=problem.query,
            images=(problem.picture,) if problem.picture else path,
            references=(problem.answer,) if problem.answer else (),
            choices=problem.choices,
        )
        for problem, path in zip(problems, paths, strict=True)
    ]


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; the score is a percentage."""
    problems = [problem for problem in load_problems(references) if only is None or problem.id in only]
    bare = [problem.id for problem in problems if not problem.answer]
    if bare:
        raise ValueError(
            f"{references}: {len(bare)} of {len(problems)} problems have no answer to compare with, first {bare[0]}: "
            "those of the test split are not public, --submission writes what MathVista's leaderboard takes"
        )
    found, extracted = _load_answers(predictions, [problem.id for problem in problems], references)
    samples, sources = [], []
    for problem in problems:
        extraction, source = _extraction(problem, found.answers[problem.id], extracted.get(problem.id, ""), options)
        sources.append(source)
        read = "" if not extraction and options["empty"] == "wrong" else normalise(extraction, problem)
        samples.append(
            Sample(
                id=problem.id,
                score=float(read == problem.answer),
                answer=found.answers[problem.id],
                parsed=read or "",
                references=(problem.answer,),
                group=str(problem.metadata.get("task", "")),
            )
        )
    statistic = mean([sample.score for sample in samples])
    counts = {name: sources.count(name) for name in ("extracted", "fallback", "unparsed")}
    return Scores(
        metric=METRIC,
        metrics={METRIC: 100 * sum(sample.score for sample in samples) / len(samples)},
        scales=SCALES,
        statistics={METRIC: statistic},
        samples=samples,
        is_right_or_wrong=True,
        groups=_groups(problems, samples),
        counts={**found.counts, **counts},
        scorer={"rule": "lupantech/MathVista evaluation/ at 53d5258, without its language model", **options},
        notes=(*found.notes, *_notes(counts, len(samples), options)),
    )


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """Write what MathVista's leaderboard takes: an object of ids to problems with response and extraction."""
    problems = load_problems(references)
    found, extracted = _load_answers(predictions, [problem.id for problem in problems], references)
    content = {}
    for problem in problems:
        response = found.answers[problem.id]
        extraction, _ = _extraction(problem, response, extracted.get(problem.id, ""), options)
        content[problem.id] = {**problem.row, "query": problem.query, "response": response, "extraction": extraction}
    write_json(output, content)


def load_problems(path: Path) -> list[Problem]:
    """All problems of a file or of a folder of Parquet files, in their order.

    Raises:
        ValueError: no such file, not MathVista's, or a problem twice.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    rows = [row for file in files for row in read_rows(file, "problems")]
    if len(rows) == 1 and isinstance(rows[0][1], dict) and "question_type" not in rows[0][1]:
        rows = [(f"{path} problem {name}", row) for name, row in rows[0][1].items()]
    problems = [_problem(row, where) for where, row in rows]
    if not problems or len({problem.id for problem in problems}) < len(problems):
        raise ValueError(f"{path} holds {'a problem twice' if problems else 'no problems of MathVista'}")
    return problems


def _problem(row: Any, where: str) -> Problem:
    try:
        problem = Problem(
            id=sample_id(row["pid"], where),
            question=row["question"],
            image=row.get("image"),
            choices=tuple(map(str, row["choices"] or ())),
            unit=row.get("unit") or "",
            precision=int(row.get("precision") or 0),
            answer=str(row.get("answer") or ""),
            question_type=row["question_type"],
            answer_type=row["answer_type"],
            metadata=row.get("metadata") or {},
            row={name: value for name, value in row.items() if name != "decoded_image"},
            picture=(row.get("decoded_image") or {}).get("bytes"),
        )
        problem.query  # noqa: B018  (a type of answer that is none is a KeyError)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is no problem of MathVista ({error!r}): it has pid, question, image, choices, unit, precision, "
            "question_type, answer_type, metadata, and answer where it is public"
        ) from None
    return problem


def _load_answers(path: Path, ids: Sequence[str], references: Path) -> tuple[Predictions, dict[str, str]]:
    """Answers, and what the official pipeline has extracted from them, where the file is its."""
    rows = [row for _, row in read_rows(path, "predictions")]
    is_official = (
        len(rows) == 1 and isinstance(rows[0], dict) and any(isinstance(row, dict) for row in rows[0].values())
    )
    if not is_official:
        return load_predictions(path, ids, references, formats=(*FORMATS, ("pid", "response"))), {}
    answered = {name: row for name, row in rows[0].items() if isinstance(row, dict) and row.get("response") is not None}
    answers = {name: str(row["response"]) for name, row in answered.items()}
    extracted = {name: str(row["extraction"]) for name, row in answered.items() if row.get("extraction") is not None}
    return match_answers(path, answers, ids, references), extracted


def _extraction(problem: Problem, response: str, extracted: str, options: Options) -> tuple[str, str]:
    """The short answer, and where it is from: "given" by the model, "extracted" in the file, "fallback", "unparsed"."""
    if extracted.strip():
        return extracted, "extracted"
    given = quick_extract(problem, response)
    if given is not None:
        return given, "given"
    found = read_answer(problem, response) if options["extraction"] == "rules" else ""
    return found, "fallback" if found else "unparsed"


def quick_extract(problem: Problem, response: str) -> str | None:
    """The official extraction as far as it goes without a language model; None where it would ask one."""
    if not response or (problem.question_type == "multi_choice" and response in problem.choices):
        return response
    kind: Callable[[str], Any] | None = {"integer": int, "float": float}.get(problem.answer_type)
    try:
        return None if kind is None else str(kind(response))
    except ValueError:
        return None


def read_answer(problem: Problem, response: str) -> str:
    """What stands in for the language model: the official quick rule, then ours; "" where they find nothing."""
    if quick := re.search(r'The answer is "(.*)"\.', response):
        return quick[1]
    if problem.question_type == "multi_choice":
        return _read_choice(problem, response.strip())
    if problem.answer_type == "list":
        return next(reversed(re.findall(r"\[[^\[\]]*\]", response)), "")
    announced = [*_ANNOUNCED.finditer(response)]
    after = _NUMBER.findall(response[announced[-1].end() :]) if announced else []
    numbers = after[:1] or _NUMBER.findall(response)
    return numbers[-1].replace(",", "") if numbers else ""


def _read_choice(problem: Problem, response: str) -> str:
    """A letter, or the text of a choice."""
    one = f"[{''.join(letters(problem))}]"
    for pattern in (
        rf"\(?({one})[).:]?$",
        rf".*(?:answer|option|choice)(?:\s+letter)?(?:\s+is)?:?\s*\**\(?({one})\b(?!')",  # the last one
        rf".*?\(({one})\)",  # the first one
        rf"({one})[).:]\s",
    ):
        if letter := re.match(pattern, response, re.DOTALL):
            return letter[1]
    text = response.lower()
    named = [one for one in problem.choices if re.search(rf"(?<!\w){re.escape(one.lower())}(?!\w)", text)]
    if named:
        return max(named, key=lambda choice: (text.rfind(choice.lower()), len(choice)))
    alone = re.findall(rf"(?<!\w)({one})(?!\w|')", response)
    return alone[-1] if alone and set(alone) != {"A"} else ""  # "A" alone is an article


def normalise(extraction: str, problem: Problem) -> str | None:
    """The official normalisation of what was extracted; None where it is not of the type that is asked for."""
    try:
        if problem.question_type == "multi_choice":
            extraction = extraction.strip()
            bracketed = re.findall(r"\(([a-zA-Z])\)", extraction)
            extraction = bracketed[0].upper() if bracketed else extraction
            if extraction in letters(problem):
                return problem.choices[letters(problem).index(extraction)]
            return min(problem.choices, key=lambda choice: edit_distance(extraction, choice))
        if problem.answer_type == "integer":
            return str(int(float(extraction)))
        if problem.answer_type == "float":
            return str(round(float(extraction), problem.precision))
        return extraction
    except (OverflowError, ValueError):
        return None


def letters(problem: Problem) -> list[str]:
    """Of the choices."""
    return [chr(ord("A") + index) for index in range(len(problem.choices))]


def edit_distance(first: str, second: str) -> int:
    """Fewest characters to insert, delete or replace (Levenshtein's)."""
    row = list(range(len(second) + 1))
    for number, character in enumerate(first, 1):
        previous, row = row, [number]
        for column, other in enumerate(second):
            row.append(min(previous[column + 1] + 1, row[column] + 1, previous[column] + (character != other)))
    return row[-1]


def _groups(problems: Sequence[Problem], samples: Sequence[Sample]) -> dict[str, dict[str, Group]]:
    groups: dict[str, dict[str, Group]] = {}
    for kind in KINDS:
        scores: dict[str, list[float]] = {}
        for problem, sample in zip(problems, samples, strict=True):
            value = getattr(problem, kind) if kind.endswith("_type") else problem.metadata.get(kind)
            for name in value if isinstance(value, (list, tuple)) else [value] if value else []:
                scores.setdefault(name, []).append(sample.score)
        if scores:
            groups[kind] = {
                name: Group(score=100 * sum(row) / len(row), num_samples=len(row)) for name, row in scores.items()
            }
    return groups


def _notes(counts: Mapping[str, int], total: int, options: Options) -> list[str]:
    notes = []
    if counts["extracted"]:
        notes.append(f"{counts['extracted']} of {total} extractions are those of the predictions' file")
    if asked := counts["fallback"] + counts["unparsed"]:
        read = (
            f"no language model is called here: rules of our own read {counts['fallback']}, and nothing in "
            f"{counts['unparsed']}"
            if options["extraction"] == "rules"
            else "they count as empty (extraction=none)"
        )
        notes.append(f"the official pipeline has GPT-4 read the answer out of {asked} of {total}; {read}")
    return notes
