"""A row to the parts of a shard's sample."""

import json
from dataclasses import dataclass

from mmcore.constants import IMAGE_TAG
from mmcore.data.conversation import read_turns
from mmcore.data.sources.images import ImageStore
from mmcore.data.sources.picture import Shrink, read_picture
from mmcore.data.sources.row import RejectedRowError, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    parts: dict[str, bytes]
    """Content by file extension: `json`, and `jpg` for one picture or `0.jpg`, `1.png`, ... for several."""
    dropped: tuple[RejectedRowError, ...] = ()
    """Pictures that the document goes without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Turns rows into samples."""

    images: ImageStore
    shrink: Shrink | None = None
    needs_image: bool = False
    """Reject what has no picture."""
    drops_pictures: bool = False
    """A picture that cannot be used costs a document its tag, not the whole document."""

    def __call__(self, row: Row) -> Sample | RejectedRowError:
        try:
            return self.read(row)
        except RejectedRowError as rejected:
            return rejected

    def read(self, row: Row) -> Sample:
        """Check a row and read its pictures.

        Raises:
            RejectedRowError: it cannot be trained on.
        """
        if row.fault is not None:
            raise RejectedRowError("format", row.fault)
        num_tags = _count_tags(row)
        if not row.images and self.needs_image:
            raise RejectedRowError("no picture", "the row names none")
        if num_tags != len(row.images):
            plural = "" if len(row.images) == 1 else "s"
            raise RejectedRowError("image tags", f"{num_tags} {IMAGE_TAG} for {len(row.images)} picture{plural}")
        pictures, text, dropped = [], row.text, []
        for index, name in enumerate(row.images):
            names = (name, *filter(None, row.urls[index : index + 1]))
            try:
                pictures.append(read_picture(self.images, names, self.shrink))
            except RejectedRowError as rejected:
                if not self.drops_pictures or text is None:
                    raise
                dropped.append(rejected)
                text = _without_tag(text, len(pictures))
        if not pictures and self.needs_image:
            raise RejectedRowError("no picture", f"all {len(dropped)} cannot be used, the first: {dropped[0]}")
        content = {"conversations": row.conversations} if text is None else {"text": text}
        return Sample(parts={**_name(pictures), "json": _to_json({"id": row.id, **content})}, dropped=tuple(dropped))


def _count_tags(row: Row) -> int:
    if row.text is not None:
        if not row.text.replace(IMAGE_TAG, "").strip():
            raise RejectedRowError("text", "the document has none")
        return row.text.count(IMAGE_TAG)
    try:
        return sum(turn.text.count(IMAGE_TAG) for turn in read_turns(row.conversations))
    except ValueError as error:
        raise RejectedRowError("conversation", str(error)) from None


def _to_json(content: dict[str, object]) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        raise RejectedRowError("text" if "text" in content else "conversation", str(error)) from None


def _without_tag(text: str, index: int) -> str:
    """The text without its tag of that number; words that only the tag kept apart get a space."""
    pieces = text.split(IMAGE_TAG)
    left, right = pieces[index : index + 2]
    is_apart = not left or not right or left[-1].isspace() or right[0].isspace()
    pieces[index : index + 2] = [left + ("" if is_apart else " ") + right]
    return IMAGE_TAG.join(pieces)


def _name(pictures: list[tuple[str, bytes]]) -> dict[str, bytes]:
    if len(pictures) == 1:
        return dict(pictures)
    return {f"{index}.{extension}": data for index, (extension, data) in enumerate(pictures)}
