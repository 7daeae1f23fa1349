"""One row of a raw data set, in one form whatever format it came in."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.foreign import parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A conversation, or a document of text and pictures, before it is checked.

    Either holds one image tag for each picture, in the pictures' order.
    """

    file: Path
    """Annotations that it is of."""
    number: int
    """Its place there, from 0."""
    id: str
    images: tuple[str, ...] = ()
    """Names of its pictures in the places of --images."""
    urls: tuple[str, ...] = ()
    """Where each came from, if known: archives of downloads may call it that."""
    conversations: list[dict[str, str]] | None = None
    text: str | None = None
    """Of a document, which has no conversations."""
    split: str | None = None
    """Part of the dataset that the file itself puts it in."""
    fault: str | None = None
    """Why it is not in its format, for formats in which one broken row does not spoil the file."""


class RejectedRowError(Exception):
    """A row, or one picture of a document, that does not go into the dataset."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        """One of a few, to count."""
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def read_json(path: Path) -> Any:
    """Content of an annotations file.

    Raises:
        ValueError: missing, unreadable or not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give the data set's annotations file") from None


def file_sha256(path: Path) -> str:
    """Hash of an annotations file.

    Raises:
        ValueError: missing or unreadable.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
