"""COCO captions (captions_train2017.json): a row for every caption, asked for as the coco benchmark asks."""

from pathlib import Path

from mmcore.constants import IMAGE_TAG
from mmcore.data.sources.row import Row, read_json

# Also the prompt of mmcore.evaluation.coco; Megatron-LM's captioning task has it too.
PROMPT = "Give a brief description of this image in one sentence."
MEND = "COCO's captions format is {images: [{id, file_name}, ...], annotations: [{id, image_id, caption}, ...]}"


def read_rows(path: Path) -> list[Row]:
    """A row for every annotation, in order.

    Raises:
        ValueError: the file is not in COCO's captions format; names the file and the annotation.
    """
    content = read_json(path)
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
        conversations = [
            {"from": "human", "value": f"{IMAGE_TAG}\n{PROMPT}"},
            {"from": "gpt", "value": " ".join(caption.split())},
        ]
        rows.append(Row(file=path, number=number, id=str(name), image=files[image_id], conversations=conversations))
    return rows
