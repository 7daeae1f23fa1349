"""One picture on its way into a shard: read, checked to its last pixel, and shrunk if asked."""

import io
from dataclasses import dataclass

from mmcore.data.sources.images import ImageStore, UnsafePathError
from mmcore.data.sources.row import RejectedRowError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrink:
    """Make large pictures small; the others keep their own bytes."""

    max_side: int
    """Longest side of a result, in pixels."""
    quality: int
    """Of its JPEG, 1 to 100."""


def read_picture(images: ImageStore, names: tuple[str, ...], shrink: Shrink | None) -> tuple[str, bytes]:
    """File extension and content of a picture.

    Args:
        names: what it may be called, the likeliest first.
    Raises:
        RejectedRowError: there is none, or it cannot be decoded.
    """
    from mmcore.data.image import decode_image, picture_extension

    data = _read(images, names)
    try:
        extension, image = picture_extension(data), decode_image(data)  # a truncated file has a sound header
    except ValueError as error:
        raise RejectedRowError("not a picture", f"{names[0]}: {error}") from None
    if shrink is None or max(image.size) <= shrink.max_side:
        return extension, data
    scale = shrink.max_side / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size])  # bicubic
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=shrink.quality)
    return "jpg", buffer.getvalue()


def _read(images: ImageStore, names: tuple[str, ...]) -> bytes:
    for name in names:
        try:
            return images.read(name)
        except UnsafePathError:
            raise RejectedRowError("unsafe path", f"{name!r} leads out of the folder of pictures") from None
        except (FileNotFoundError, UnicodeEncodeError):  # half a surrogate pair is in no file's name
            continue
        except OSError as error:
            raise RejectedRowError("unreadable picture", f"{name}: {error.strerror}") from None
    raise RejectedRowError("missing picture", " or ".join(map(ascii, names)) if len(names) > 1 else names[0])
