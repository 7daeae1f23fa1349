"""LLaVA's own format: a JSON list of {"id", "image", "conversations": [{"from", "value"}, ...]}.

llava-pretrain (LLaVA-Pretrain's blip_laion_cc_sbu_558k.json): one question with one answer a row, a
picture in every row. llava-instruct (llava_v1_5_mix665k.json and its like): several rounds, and rows
without a picture.
"""

from pathlib import Path
from typing import Any

from mmcore.data.sources.row import Row, read_json

MEND = "LLaVA's format is a list of {id, image, conversations: [{from, value}, ...]}"


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, in order.

    Raises:
        ValueError: the file is not in LLaVA's format; names the file and the row.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} holds {_kind(content)} where a list belongs: {MEND}")
    return [_read_row(item, number, path) for number, item in enumerate(content)]


def _read_row(item: Any, number: int, path: Path) -> Row:
    where = f"row {number} of {path}"
    if not isinstance(item, dict):
        raise ValueError(f"{where} is {_kind(item)}: {MEND}")
    conversations, image = item.get("conversations"), item.get("image")
    if not isinstance(conversations, list):
        raise ValueError(f"{where} has no list of conversations (its keys: {', '.join(item)}): {MEND}")
    for turn in conversations:
        if not isinstance(turn, dict) or any(not isinstance(turn.get(key), str) for key in ("from", "value")):
            raise ValueError(f"{where} has a turn without the texts 'from' and 'value': {MEND}")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"{where} has {_kind(image)} as image: one picture a row, by its path")
    images = () if image is None else (image,)
    return Row(file=path, number=number, id=str(item.get("id", number)), images=images, conversations=conversations)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null")
