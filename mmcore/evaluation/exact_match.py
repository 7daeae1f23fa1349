"""Exact match: an answer is right if it is one of the references, character by character.

Nothing is normalised but white space: runs of it (line breaks and no-break spaces included) count as one space, and
there is none at the ends. Case, punctuation and articles count. References are LLaVA's JSON, where the first human
turn is the question and the turn after it the answer, or captions in any form of `coco`, where any caption of the
picture is right.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from mmcore.constants import IMAGE_TAG
from mmcore.evaluation import coco
from mmcore.evaluation.confidence import mean
from mmcore.evaluation.predictions import load_predictions
from mmcore.evaluation.scores import Sample, Scores
from mmcore.evaluation.task import Example, Options, find_images, only_these, read_json, sample_id

METRIC = "exact_match"
SCALES = {METRIC: "percent"}
OPTIONS: dict[str, tuple[str, ...]] = {}


def matches(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer is one of the references, white space folded."""
    return fold(answer) in map(fold, references)


def fold(text: str) -> str:
    """White space as one space, none at the ends."""
    return " ".join(text.split())


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`. The prompt has no image tag: LLaVA puts the picture first, wherever the tag is."""
    rows = _load_conversations(data)
    if rows is None:
        return coco.examples(data, images, options=options)
    paths = find_images(data, images, [image for _, image, _, _ in rows])
    return [
        Example(id=name, images=path, prompt=question, references=(answer,))
        for (name, _, question, answer), path in zip(rows, paths, strict=True)
    ]


def load_references(path: Path) -> dict[str, tuple[str, ...]]:
    """What is right, by id.

    Raises:
        ValueError: neither LLaVA's format nor captions.
    """
    rows = _load_conversations(path)
    return coco.load_captions(path) if rows is None else {name: (answer,) for name, _, _, answer in rows}


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; the score is a percentage."""
    right = only_these(load_references(references), only)
    found = load_predictions(predictions, list(right), references)
    samples = [
        Sample(id=name, answer=answer, references=right[name], score=float(matches(answer, right[name])))
        for name, answer in found.answers.items()
    ]
    statistic = mean([sample.score for sample in samples])
    return Scores(
        metric=METRIC,
        metrics={METRIC: 100 * sum(sample.score for sample in samples) / len(samples)},
        scales=SCALES,
        statistics={METRIC: statistic},
        samples=samples,
        counts=found.counts,
        is_right_or_wrong=True,
        scorer={"normalisation": "white space folded, nothing else"},
        notes=found.notes,
    )


def _load_conversations(path: Path) -> list[tuple[str, str | None, str, str]] | None:
    """(id, image, question, answer) of every LLaVA row, or None if the file is not in LLaVA's format."""
    content = read_json(path, "references")
    if not (isinstance(content, list) and content and isinstance(content[0], dict) and "conversations" in content[0]):
        return None
    rows = [_first_pair(row, f"{path} row {index}") for index, row in enumerate(content)]
    seen: set[str] = set()
    for name, *_ in rows:
        if name in seen:
            raise ValueError(f"{path} has id {name} twice: an answer could not be matched to its question")
        seen.add(name)
    return rows


def _first_pair(row: Any, where: str) -> tuple[str, str | None, str, str]:
    try:
        human, gpt = row["conversations"][:2]
        name, image, question, answer = row["id"], row.get("image"), human["value"], gpt["value"]
        is_llava = (human["from"], gpt["from"]) == ("human", "gpt")
    except (AttributeError, KeyError, TypeError, ValueError):
        is_llava = False
    if not (is_llava and isinstance(question, str) and isinstance(answer, str) and isinstance(image, str | None)):
        raise ValueError(
            f"{where} is not in LLaVA's format: it takes id, image (if there is one) and conversations, which begin "
            'with a turn from "human" and one from "gpt", each with its value'
        )
    if question.count(IMAGE_TAG) > (image is not None):
        raise ValueError(f"{where} has {question.count(IMAGE_TAG)} image tags, but {'one' if image else 'no'} picture")
    return sample_id(name, where), image, question.replace(IMAGE_TAG, "").strip(), answer
