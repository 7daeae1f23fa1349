"""COCO captions: a row for every caption, asked for as the coco benchmark asks.

Either COCO's own file (captions_train2017.json), or Karpathy's (dataset_coco.json), which says of every
picture where it belongs: `train` and `restval` become the train split, `val` and `test` keep their names.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmcore.constants import IMAGE_TAG
from mmcore.data.sources.row import Row, read_json

# Also the prompt of mmcore.evaluation.coco; Megatron-LM's captioning task has it too.
PROMPT = "Give a brief description of this image in one sentence."
MEND = "COCO's captions format is {images: [{id, file_name}, ...], annotations: [{id, image_id, caption}, ...]}"
KARPATHY_MEND = "Karpathy's format is {images: [{filepath, filename, split, sentences: [{raw, sentid}, ...]}, ...]}"
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read_rows(path: Path) -> list[Row]:
    """A row for every caption, in order.

    Raises:
        ValueError: the file is in neither format; names the file and what is wrong in it.
    """
    content = read_json(path)
    if isinstance(content, dict) and "annotations" not in content and _is_karpathys(content.get("images")):
        return list(_read_karpathy(content["images"], path))
    return _read_coco(content, path)


def _read_coco(content: Any, path: Path) -> list[Row]:
    try:
        files = {picture["id"]: str(picture["file_name"]) for picture in content["images"]}
        annotations = list(content["annotations"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks {error}: {MEND}") from None
    rows = []
    for number, annotation in enumerate(annotations):
        try:
            name, caption, image_id = annotation.get("id", number), annotation["caption"], annotation["image_id"]
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"annotation {number} of {path} has no caption or no image_id: {MEND}") from None
        if image_id not in files or not isinstance(caption, str):
            raise ValueError(f"annotation {number} of {path} is of an unknown picture, or its caption no text: {MEND}")
        rows.append(_row(path, number, str(name), files[image_id], caption))
    return rows


def _is_karpathys(images: Any) -> bool:
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def _read_karpathy(images: list[Any], path: Path) -> Iterator[Row]:
    number = 0
    for index, image in enumerate(images):
        try:
            name, split = f"{image['filepath']}/{image['filename']}", KARPATHY_SPLITS[image["split"]]
            captions = [(str(sentence["sentid"]), str(sentence["raw"])) for sentence in image["sentences"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"picture {index} of {path} lacks, or has an unknown, {error}: {KARPATHY_MEND}, and "
                f"the splits are {', '.join(KARPATHY_SPLITS)}"
            ) from None
        for id, caption in captions:
            yield _row(path, number, id, name, caption, split)
            number += 1


def _row(path: Path, number: int, id: str, image: str, caption: str, split: str | None = None) -> Row:
    conversations = [
        {"from": "human", "value": f"{IMAGE_TAG}\n{PROMPT}"},
        {"from": "gpt", "value": " ".join(caption.split())},
    ]
    return Row(file=path, number=number, id=id, images=(image,), conversations=conversations, split=split)
