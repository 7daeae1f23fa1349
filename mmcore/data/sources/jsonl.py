"""The general source: one JSON object a line, UTF-8; .jsonl, .jsonl.gz, or a zip with one such file.

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}]}
    {"images": ["b.jpg", "c.png"], "text": "Before.<image>Between.<image>After."}
    {"id": "7", "conversations": [...]}

id             a text or a number; the line's number, from 0, if left out
image          path of one picture in a place of --images; or
images         a list of them, in order; neither for text alone
conversations  turns in LLaVA's form, from `system`, `human` and `gpt`; only answers are trained; or
text           a document with pictures anywhere in it; all of it is trained, line breaks as they stand

`<image>` stands once for every picture, in their order. Other keys are left out. A line that is
none of this is rejected, the others are kept.
"""

from pathlib import Path
from typing import Any

from mmcore.data.sources.lines import read_json_lines
from mmcore.data.sources.row import Row


def read_rows(path: Path) -> list[Row]:
    """All lines that are not blank, in order; of a line with a fault, the fault.

    Raises:
        ValueError: the file cannot be read.
    """
    rows = []
    for number, content in read_json_lines(path):
        fault = _find_fault(content)
        if fault:
            rows.append(Row(file=path, number=number, id=str(number), fault=fault))
        else:
            rows.append(_read_row(content, number, path))
    return rows


def _read_row(content: dict[str, Any], number: int, path: Path) -> Row:
    images = content.get("images")
    if images is None:
        images = [content["image"]] if content.get("image") is not None else []
    return Row(
        file=path,
        number=number,
        id=str(content.get("id", number)),
        images=tuple(images),
        conversations=content.get("conversations"),
        text=content.get("text"),
    )


def _find_fault(content: Any) -> str | None:
    if isinstance(content, ValueError):
        return f"not JSON ({content})"
    if not isinstance(content, dict):
        return "not an object"
    if (content.get("conversations") is None) == (content.get("text") is None):
        return "either conversations or text belongs there, not both or neither"
    if content.get("image") is not None and content.get("images") is not None:
        return "either image or images belongs there, not both"
    if not isinstance(content.get("text", ""), str | None):
        return "text is no text"
    if not isinstance(content.get("image"), str | None):
        return "image is no path: several belong into images"
    images = content.get("images")
    if images is not None and not (isinstance(images, list) and all(isinstance(image, str) for image in images)):
        return "images is no list of paths"
    if not isinstance(content.get("id", ""), str | int):
        return "id is neither a text nor a number"
    return None
