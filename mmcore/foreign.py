"""What is believed of a file that a stranger made: how large it may be, and how much more a small one may stand for.

Light, for all rooms. Names that files have for code are refused where they are read:
mmcore.pickles, mmcore.data.energon.
"""

import ast
import json
import math
import re
import zipfile
from typing import Any

# What Pillow may try, and the extension that a sample of a shard has for it. Pillow knows dozens more,
# some of which run other programs (EPS).
PICTURE_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}

# Checked before anything is decoded: a file of a few kilobytes can stand for gigabytes of pixels.
MAX_PIXELS = 1 << 26

# Tags of TIFF (TIFF 6.0, section 15).
TILE_WIDTH, TILE_LENGTH = 322, 323

# Of one picture's file, and of one line of JSON Lines.
MAX_PICTURE_BYTES, MAX_LINE_BYTES = 1 << 28, 1 << 24

# Names that a pattern such as `train_{000000..000009}.tar` stands for.
MAX_NAMES = 1 << 20

# Compressed text, tables and pictures take more than a hundredth of what they stand for, unless that is little.
MAX_RATIO, FREE_BYTES = 100, 1 << 23


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, of which a thousand brackets are no fault of ours.

    Raises:
        json.JSONDecodeError: not JSON, or nested too deeply.
        UnicodeDecodeError: of bytes, no text.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None


def check_pixels(image: Any, share: int = 1) -> None:
    """Look at what a picture's header promises.

    Args:
        image: Pillow's, opened and not yet decoded.
        share: of MAX_PIXELS so many-th parts are let pass, for who copies them more often.
    Raises:
        ValueError: it has too many pixels, or is to be decoded in tiles of too many.
    """
    limit = MAX_PIXELS // (max(share, 2) if image.format == "WEBP" else share)  # of which Pillow makes four copies
    if image.width * image.height > limit:
        raise ValueError(f"a picture of {image.width} x {image.height} pixels; at most {limit} are decoded")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    width, height = tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0)
    if width * height > limit:
        raise ValueError(f"a picture in tiles of {width} x {height} pixels; at most {limit} are decoded")


def parse_literal(text: str) -> Any:
    """A list or the like as Python prints it.

    Raises:
        ValueError: it is something else, or nested too deeply.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two where it is deep
        raise ValueError(f"{text!r:.80} is no list as Python prints it") from None


def expand(pattern: str) -> list[str]:
    """Names that a pattern stands for, as a shell expands braces.

    Raises:
        ValueError: they are too many, or braces stand in braces.
    """
    import braceexpand

    if re.search(r"\{[^}]*\{", pattern):
        raise ValueError(f"{pattern!r:.80} has braces in braces")
    if math.prod(map(_count, re.findall(r"\{([^{}]*)\}", pattern))) > MAX_NAMES:
        raise ValueError(f"{pattern!r:.80} stands for more than {MAX_NAMES} names")
    return list(braceexpand.braceexpand(pattern))


def _count(inside: str) -> int:
    """At most how many names braces stand for."""
    if numbers := re.match(r"(-?\d+)\.\.(-?\d+)", inside):
        return abs(int(numbers[2]) - int(numbers[1])) + 1
    return 26 if ".." in inside else 1 + inside.count(",")


def check_unpacked(where: str, packed: int, unpacked: int) -> None:
    """Refuse what is far larger than the file that it comes out of.

    Args:
        where: for the message.
        packed, unpacked: bytes.
    Raises:
        ValueError: it is.
    """
    if unpacked > max(FREE_BYTES, MAX_RATIO * packed):
        raise ValueError(
            f"{where} would unpack to {unpacked} bytes or more from {packed}, as no honest file does: take it from "
            "where you trust what you get, or unpack it yourself"
        )


def check_zip(archive: zipfile.ZipFile, where: str) -> None:
    """`check_unpacked`, for all of an archive's files together.

    Raises:
        ValueError: they are far larger than the archive.
    """
    assert archive.fp is not None
    position = archive.fp.tell()
    packed = archive.fp.seek(0, 2)
    archive.fp.seek(position)
    check_unpacked(where, packed, sum(entry.file_size for entry in archive.infolist()))
