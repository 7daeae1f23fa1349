"""COCO captions: one sentence a picture, scored by pycocoevalcap (BLEU, METEOR, ROUGE-L, CIDEr).

Four forms of the references are in circulation, and all are read:

- COCO's own: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "id", "caption"}]}`
- Karpathy's dataset_coco.json: `{"images": [{"cocoid", "filepath", "filename", "split", "sentences": [{"raw"}]}]}`,
  of which the test split counts
- a list: `[{"image" or "image_id", "caption": [...]}]`
- an object of ids to captions: `{"1": ["...", ...]}`

METEOR's number for all captions together is not the mean of theirs: its fragmentation penalty is nothing for captions
that are all right and a quarter of the score as soon as a few are not. That is the official number.

SPICE is left out: its scorer downloads a parser when it is made, and blocks all others where it cannot.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from mmcore.evaluation.metrics.captions import Tokenizer, score_captions
from mmcore.evaluation.predictions import load_predictions
from mmcore.evaluation.scores import Sample, Scores
from mmcore.evaluation.task import Example, Options, find_images, only_these, read_json, sample_id

# Megatron-LM, examples/multimodal/run_text_generation.py at commit d98e8a6, task "captioning".
PROMPT = "Give a brief description of this image in one sentence."

METRIC = "CIDEr"
SCALES = {
    **{f"Bleu_{n}": "0 to 1" for n in range(1, 5)},
    "METEOR": "0 to 1",
    "ROUGE_L": "0 to 1",
    "CIDEr": "0 to 10",
}
OPTIONS = {
    # How captions are cut into words: by Java's PTB tokenizer (auto: where Java runs, else python), by rules close to
    # its, or not, where they are cut already.
    "tokenizer": ("auto", "ptb", "python", "none"),
}

# COCO's file names: COCO_val2014_000000391895.jpg and 000000391895.jpg are the picture 391895.
_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")


@dataclass(frozen=True, slots=True)
class Picture:
    """A row of the references: id, file name in the pictures' folder (if it is told), captions."""

    id: str
    file_name: str | None
    captions: tuple[str, ...]


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; captions need not be there."""
    pictures = load_pictures(data)
    for row, picture in enumerate(pictures):
        if picture.file_name is None:
            raise ValueError(f"{data}: picture {picture.id} (row {row}, from 0) has no file name to load it from")
    paths = find_images(data, images, [picture.file_name for picture in pictures])
    return [
        Example(id=picture.id, images=path, prompt=PROMPT, references=picture.captions)
        for picture, path in zip(pictures, paths, strict=True)
    ]


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`. All numbers are pycocoevalcap's own, unscaled: CIDEr can reach 10, the others 1."""
    captions = only_these(load_captions(references), only)
    found = load_predictions(predictions, list(captions), references)
    result = score_captions(found.answers, captions, cast(Tokenizer, options["tokenizer"]))
    notes = [*found.notes, *result.notes]
    if len(captions) == 1:
        notes.append("CIDEr weighs words by how few of the pictures have them: for a single picture it is always 0")
    return Scores(
        metric=METRIC,
        metrics=result.metrics,
        scales={name: SCALES[name] for name in result.metrics},
        statistics=result.statistics,
        samples=[
            Sample(id=name, answer=answer, references=captions[name], score=result.cider[name])
            for name, answer in found.answers.items()
        ],
        counts=found.counts,
        skipped=result.skipped,
        scorer=result.scorer,
        notes=tuple(notes),
    )


def load_captions(references: Path) -> dict[str, tuple[str, ...]]:
    """Captions by picture.

    Raises:
        ValueError: not one of the four forms, or a picture without a caption.
    """
    pictures = load_pictures(references)
    bare = [picture.id for picture in pictures if not picture.captions]
    if bare:
        raise ValueError(
            f"{references}: {len(bare)} of {len(pictures)} pictures have no caption to compare with, first {bare[0]}"
        )
    return {picture.id: picture.captions for picture in pictures}


def load_pictures(path: Path) -> list[Picture]:
    """Read any of the four forms.

    Raises:
        ValueError: none of them, no pictures, or a picture twice.
    """
    content = read_json(path, "captions")
    try:
        if isinstance(content, list):
            pictures = [_from_list(row, f"{path} row {index}") for index, row in enumerate(content)]
        elif "annotations" in content:
            pictures = _from_coco(content, path)
        elif "images" not in content and content and all(isinstance(value, list) for value in content.values()):
            rows = ({"image_id": name, "caption": captions} for name, captions in content.items())
            pictures = [_from_list(row, f"{path} image {row['image_id']}") for row in rows]
        else:
            test = [row for row in content["images"] if row["split"] == "test"]
            pictures = [_from_karpathy(row, f"{path} image {index}") for index, row in enumerate(test)]
    except (AttributeError, KeyError, TypeError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else "an object is expected where there is none"
        raise ValueError(
            f"{path} holds no captions in any of the known forms: {what} (see `mmcore.evaluation.coco`)"
        ) from None
    if not pictures:
        raise ValueError(f"{path} holds no pictures (of Karpathy's form, the test split counts)")
    seen: set[str] = set()
    for picture in pictures:
        if picture.id in seen:
            raise ValueError(f"{path} has picture {picture.id} twice")
        seen.add(picture.id)
    return pictures


def _from_coco(content: Mapping[str, Any], path: Path) -> list[Picture]:
    captions: dict[str, list[str]] = {sample_id(row["id"], f"{path} images"): [] for row in content["images"]}
    for row in content["annotations"]:
        name = sample_id(row["image_id"], f"{path} annotations")
        if name not in captions:
            raise ValueError(f"{path}: a caption is for image {name}, which is not among its images")
        captions[name].append(_text(row["caption"], f"{path} annotations, image {name}"))
    if len(captions) != len(content["images"]):
        raise ValueError(f"{path} has two images with the same id")
    return [Picture(str(row["id"]), row.get("file_name"), tuple(captions[str(row["id"])])) for row in content["images"]]


def _from_karpathy(row: Mapping[str, Any], where: str) -> Picture:
    name = sample_id(row["cocoid"] if "cocoid" in row else row["imgid"], where)
    captions = tuple(_text(sentence["raw"], where) for sentence in row["sentences"])
    return Picture(name, str(PurePosixPath(row.get("filepath", ""), row["filename"])), captions)


def _from_list(row: Mapping[str, Any], where: str) -> Picture:
    file_name = row.get("image", row.get("file_name"))
    if "image_id" in row:
        name = sample_id(row["image_id"], where)
    elif isinstance(file_name, str):
        coco = _COCO_NAME.fullmatch(PurePosixPath(file_name).stem)
        name = str(int(coco[1])) if coco else file_name
    else:
        raise KeyError("image")
    captions = row["captions"] if "captions" in row else row["caption"]
    captions = [captions] if isinstance(captions, str) else captions
    return Picture(name, file_name, tuple(_text(caption, where) for caption in captions))


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{where}: a caption is a text, not {value!r:.80}")
