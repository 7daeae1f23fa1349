"""A-OKVQA: questions that need knowledge of the world, as multiple choice and answered directly.

The numbers are those of allenai/aokvqa, evaluation/eval_predictions.py at commit 83786de, in percent. Multiple choice:
the prediction is the right choice, character by character. Direct answer: min(1, n / 3) of the n people out of ten who
answered so, character by character; questions with `difficult_direct_answer` are left out. A question without a
prediction counts 0. `score` is multiple_choice where the predictions have any, else direct_answer.

Predictions are read in these forms:

- the benchmark's own, `{question_id: {"multiple_choice": ..., "direct_answer": ...}}`, of which one may be absent:
  texts, compared as they are
- ids to one text each (what its prepare_predictions.py joins), and rows of `mmcore generate` and of LLaVA: the text is
  the answer to both. If it is none of the question's choices, but names one by its letter as LLaVA writes it (see
  `mmcore.evaluation.metrics.choices.llava_letter`) or is `(A) text`, it stands for that choice
- MLLM-DataEngine's aokvqa_eval.json, rows of `idx` and `model_answer`, and the same by kind of question

Upstream maps free text to the choice with the closest GloVe vector (remap_predictions.py, which downloads them); here
it is wrong, and counted as unparsed.

Questions are those of aokvqa_v1p0_val.json, or of the Parquet files of HuggingFaceM4/A-OKVQA.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from typing import Any, Literal

from mmcore.evaluation.choice_questions import (
    SHORT_INSTRUCTION,
    cells,
    describe,
    find_pictures,
    lettered,
    named,
    read_shards,
)
from mmcore.evaluation.confidence import mean
from mmcore.evaluation.metrics.choices import llava_letter
from mmcore.evaluation.predictions import FORMATS, Predictions, match_answers
from mmcore.evaluation.scores import EvaluationError, Sample, Scores, write_json
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options, only_these, sample_id
from mmcore.foreign import parse_literal

METRIC = "multiple_choice"
SCALES = {METRIC: "percent", "direct_answer": "percent"}
OPTIONS = {
    # What is asked. letter: the choices, to be answered by a letter; short: no choices, for a word or phrase (both as
    # LLaVA-1.5 does; answers of the second are scored as direct answers alone); data-engine: the choices as
    # MLLM-DataEngine has them, the answer being the one with the lowest loss (`--answer-by option-loss`).
    "prompt": ("letter", "short", "data-engine"),
    # official: predictions as they are; data-engine: of each what comes before its first full stop, in lower case, as
    # minigpt4/tasks/aokvqa_tools.py of MLLM-DataEngine at commit e4fb0f6 does. Its own files are always read so.
    "reading": ("official", "data-engine"),
    # As of eval_aokvqa in the official file: no, as its command line has it; yes: nothing is scored unless every
    # question has a prediction, and every one of multiple choice is one of the choices.
    "strict": ("no", "yes"),
}

Item = Mapping[str, Any]
"""A question, as the benchmark's file has it."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Of a file of predictions, by question."""

    choice: dict[str, str] = field(default_factory=dict)
    direct: dict[str, str] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    """As the model wrote them."""
    repeated: list[str] = field(default_factory=list)
    contradictory: list[str] = field(default_factory=list)


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`. Pictures are COCO 2017's: `images` is its folder, or that of the split in it."""
    items = load_items(data)
    numbers = [None if "image" in item else f"{int(item['image_id']):012}.jpg" for item in items.values()]
    # As get_coco_path of load_aokvqa.py has them.
    splits = [f"{item.get('split', 'val')}2017" for item in items.values()]
    full = [number and f"{split}/{number}" for split, number in zip(splits, numbers, strict=True)]
    names = named(data, images, full, numbers)
    shown = [(name,) if name else cells(item["image"]) for item, name in zip(items.values(), names, strict=True)]
    is_engine = options["prompt"] == "data-engine"
    return [
        Example(
            id=name,
            prompt=prompt(item, options["prompt"]),
            images=pictures,
            references=tuple(dict.fromkeys([*right(item), *(item.get("direct_answers") or ())])),
            choices=tuple(engine_choices(item) if is_engine else item["choices"]),
        )
        for (name, item), pictures in zip(items.items(), find_pictures(data, images, shown), strict=True)
    ]


def prompt(item: Item, kind: str) -> str:
    """What is asked; `kind` as of OPTIONS."""
    if kind == "letter":
        return lettered(item["question"], item["choices"])
    # MLLM-DataEngine, minigpt4/tasks/vqa_blip2.py at commit e4fb0f6.
    return f"{item['question']}\n{SHORT_INSTRUCTION if kind == 'short' else ' '.join(engine_choices(item))}"


def engine_choices(item: Item) -> list[str]:
    """The choices as MLLM-DataEngine writes them, and takes the loss of."""
    return [f"({letter}) {choice}" for letter, choice in zip("ABCDEFG", item["choices"], strict=False)]


def right(item: Item) -> list[str]:
    """The right choice, if it is public."""
    return [] if item.get("correct_choice_idx") is None else [item["choices"][item["correct_choice_idx"]]]


def load_items(path: Path) -> dict[str, Item]:
    """Questions by id.

    Raises:
        ValueError: not this benchmark's file, or an id is there twice.
    """
    found: dict[str, Item] = {}
    for where, item in read_shards(path, "references"):
        if not isinstance(item, dict) or not {"question_id", "question", "choices"} <= item.keys():
            raise ValueError(
                f"{where} is no question of A-OKVQA (question_id, question, choices, ...): {describe(item)}"
            )
        name = sample_id(item["question_id"], where)
        if name in found:
            raise ValueError(f"{where}: question {name} is there twice")
        # The Parquet files hold this list as Python prints it.
        texts = item.get("direct_answers")
        found[name] = {**item, "direct_answers": parse_literal(texts)} if isinstance(texts, str) else item
    if not found:
        raise ValueError(f"{path} holds no questions")
    return found


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    items = only_these(load_items(references), only)
    for name, item in items.items():
        if not right(item) or not isinstance(item.get("difficult_direct_answer"), bool):
            raise ValueError(
                f"{references}: the right answer of question {name} is missing. Those of the test split are not "
                "public: --submission writes what the leaderboard takes"
            )
    easy = {name: item for name, item in items.items() if not item["difficult_direct_answer"]}
    answers = load_answers(predictions, items, options)
    parts = {}
    if answers.choice or not answers.direct:
        found = _match(predictions, answers, answers.choice, list(items), references, options)
        _check_choices(predictions, found.answers, items, options)
        parts["multiple_choice"] = found, [float([found.answers[name]] == right(items[name])) for name in items]
    # Answers to questions that do not count are not foreign.
    direct = {name: text for name, text in answers.direct.items() if name in easy or name not in items}
    if direct and easy:
        found = _match(predictions, answers, direct, list(easy), references, options)
        values = [min(1.0, easy[name]["direct_answers"].count(text) / 3) for name, text in found.answers.items()]
        parts["direct_answer"] = found, values
    if not parts:
        raise EvaluationError(f"{predictions} has direct answers alone, to questions that are too difficult for them")
    metric = next(iter(parts))
    found, values = parts[metric]
    counts = dict(found.counts)
    if metric == METRIC:
        counts["unparsed"] = sum(
            bool(text.strip()) and text not in items[name]["choices"] for name, text in found.answers.items()
        )
    notes = list(found.notes)
    if "direct_answer" in parts and len(easy) < len(items):
        notes.append(
            f"{len(items) - len(easy)} of {len(items)} questions are difficult to answer directly: direct_answer "
            "leaves them out, as the official scorer does"
        )
    return Scores(
        metric=metric,
        # As exact as it gets: the official sum() differs in the last digit from one Python to the next.
        metrics={name: fsum(values) / len(values) * 100 for name, (_, values) in parts.items()},
        scales={name: SCALES[name] for name in parts},
        statistics={name: mean(values) for name, (_, values) in parts.items()},
        samples=[
            Sample(
                id=name,
                score=value,
                answer=answers.given.get(name, ""),
                parsed=text if metric != METRIC or text in items[name]["choices"] else "",
                references=tuple(
                    right(items[name]) if metric == METRIC else dict.fromkeys(items[name]["direct_answers"])
                ),
            )
            for (name, text), value in zip(found.answers.items(), values, strict=True)
        ],
        is_right_or_wrong=metric == METRIC,
        counts=counts,
        scorer={"rule": "allenai/aokvqa eval_predictions.py at 83786de", **options},
        notes=tuple(notes),
    )


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """Write predictions_test.json for the leaderboard, in the benchmark's own form."""
    items = load_items(references)
    answers = load_answers(predictions, items, options)
    strict = {**options, "strict": "yes"}
    parts = {part: texts for part, texts in zip(SCALES, (answers.choice, answers.direct), strict=True) if texts}
    for texts in parts.values() or [{}]:
        _match(predictions, answers, texts, list(items), references, strict)
    _check_choices(predictions, answers.choice, items, strict)
    write_json(output, {name: {part: texts[name] for part, texts in parts.items()} for name in items})


def _match(
    path: Path, answers: Answers, texts: Mapping[str, str], ids: Sequence[str], references: Path, options: Options
) -> Predictions:
    missing: Literal["refuse", "empty"] = "refuse" if options["strict"] == "yes" else "empty"
    return match_answers(path, texts, ids, references, missing, len(answers.repeated), answers.contradictory)


def _check_choices(path: Path, texts: Mapping[str, str], items: Mapping[str, Item], options: Options) -> None:
    wrong = [name for name, text in texts.items() if text not in items[name]["choices"]]
    if wrong and options["strict"] == "yes":
        raise EvaluationError(
            f"{path}: {len(wrong)} of {len(texts)} predictions are none of their question's choices, the first is that "
            f"of {wrong[0]}, {texts[wrong[0]]!r:.80}"
        )


def load_answers(path: Path, items: Mapping[str, Item], options: Options) -> Answers:
    """Read predictions in any of the forms.

    Raises:
        ValueError: missing, unreadable, or in none of them.
    """
    answers = Answers()
    for name, texts, given in _entries(path, items, options):
        if name in answers.given:
            same = answers.given[name] == given
            (answers.repeated if same else answers.contradictory).append(name)
            continue
        answers.given[name] = given
        for part, text in texts.items():
            if options["reading"] == "data-engine":
                text = text.split(".")[0].lower()
            (answers.choice if part == METRIC else answers.direct)[name] = text
    return answers


def _entries(path: Path, items: Mapping[str, Item], options: Options) -> Iterator[tuple[str, dict[str, str], str]]:
    """(id, texts by metric, answer as it was given)."""
    parts = ("direct_answer",) if options["prompt"] == "short" else tuple(SCALES)

    def entry(name: str, value: Any, where: str) -> tuple[str, dict[str, str], str]:
        if isinstance(value, dict) and value.keys() & SCALES.keys():
            texts = {part: value[part] for part in SCALES if value.get(part) is not None}
            if all(isinstance(text, str) for text in texts.values()):
                return name, texts, next(iter(texts.values()), "")
        if isinstance(value, dict) and isinstance(value.get("model_answer"), str):
            given = value["model_answer"]
            return name, dict.fromkeys(SCALES, given.split(".")[0].lower()), given
        if not isinstance(value, str):
            raise ValueError(f"{where}: the answer to {name} is a text, not {value!r:.80}")
        has_letters = name in items and options["prompt"] != "short"
        return name, dict.fromkeys(parts, as_choice(value, items[name]["choices"]) if has_letters else value), value

    for where, row in read_rows(path, "predictions"):
        key = next((key for key in ("question_id", "idx", "id") if isinstance(row, dict) and key in row), None)
        pair = next((pair for pair in FORMATS if isinstance(row, dict) and row.keys() >= set(pair)), None)
        if key and row.keys() & {*SCALES, "model_answer"}:
            yield entry(sample_id(row[key], where), row, where)
        elif pair:
            yield entry(sample_id(row[pair[0]], where), row[pair[1]], where)
        elif isinstance(row, dict) and where == str(path):  # one object
            for name, value in row.items():
                for case in value if isinstance(value, list) else [value]:  # cases by kind, or ids
                    is_case = isinstance(case, dict) and "idx" in case
                    yield entry(sample_id(case["idx"], where) if is_case else name, case, where)
        else:
            raise ValueError(
                f"{where}: a prediction of A-OKVQA is an id with multiple_choice, direct_answer, answer or "
                f"model_answer: {describe(row)}"
            )


def as_choice(answer: str, choices: Sequence[str]) -> str:
    """The choice that an answer stands for, or the answer itself."""
    if answer in choices:
        return answer
    for letter, choice in zip("ABCDEFG", choices, strict=False):
        if answer == f"({letter}) {choice}" or llava_letter(answer, "ABCDEFG"[: len(choices)]) == letter:
            return choice
    return answer
