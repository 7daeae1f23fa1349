"""One sample of a raw data set, before and after it is checked and its picture read."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmcore.constants import IMAGE_TAG
from mmcore.data.conversation import read_turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample in LLaVA's form, whatever format it came in."""

    file: Path
    """Annotations that it is of."""
    number: int
    """Its place there, from 0."""
    id: str
    image: str | None
    """Path of its picture below the folder of pictures."""
    conversations: list[dict[str, str]]


class RejectedRowError(Exception):
    """A row that does not go into the dataset."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        """One of a few, to count."""
        self.detail = detail


def read_json(path: Path) -> Any:
    """Content of an annotations file.

    Raises:
        ValueError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give the data set's annotations file") from None


def sample_parts(row: Row, images: Path, *, needs_image: bool) -> dict[str, bytes]:
    """Check a row and read its picture.

    Args:
        images: folder of the pictures.
        needs_image: reject rows that have none.
    Returns:
        Content by file extension: the picture's own bytes, and the conversation.
    Raises:
        RejectedRowError: the row cannot be trained on.
    """
    try:
        turns = read_turns(row.conversations)
        text = json.dumps({"id": row.id, "conversations": row.conversations}, ensure_ascii=False).encode()
    except ValueError as error:  # also of half a surrogate pair, which JSON can spell and UTF-8 cannot
        raise RejectedRowError("conversation", str(error)) from None
    if row.image is None and needs_image:
        raise RejectedRowError("no picture", "the row names none")
    num_images, num_tags = int(row.image is not None), sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if num_tags != num_images:
        raise RejectedRowError("image tags", f"{num_tags} {IMAGE_TAG} for {num_images} picture")
    picture = {} if row.image is None else _read_picture(images, row.image)
    return {**picture, "json": text}


def _read_picture(images: Path, name: str) -> dict[str, bytes]:
    from mmcore.data.image import decode_image, picture_extension

    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise RejectedRowError("unsafe path", f"{name!r} leads out of the folder of pictures")
    try:
        data = (images / name).read_bytes()
    except FileNotFoundError:
        raise RejectedRowError("missing picture", name) from None
    except OSError as error:
        raise RejectedRowError("unreadable picture", f"{name}: {error.strerror}") from None
    try:
        extension = picture_extension(data)
        decode_image(data)  # to the last pixel: a truncated file has a sound header
    except ValueError as error:
        raise RejectedRowError("not a picture", f"{name}: {error}") from None
    return {extension: data}
