"""Pictures small enough to lie inside a page."""

import base64
import io
from pathlib import Path

from mmcore.foreign import PICTURE_FORMATS, check_pixels

# What browsers show as it is.
KINDS = ("image/png", "image/jpeg", "image/webp", "image/gif")
SMALL_BYTES = 1 << 15


def data_uri(image: Path | bytes, edge: int) -> tuple[str, int]:
    """The picture, no side of it longer than `edge` pixels, as the source of an <img>; and its longer side as it was.

    It stands upright, as its EXIF orientation has it, and on white where it is transparent: charts are made for paper.

    Raises:
        ValueError: it cannot be read, or has too many pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        content = image.read_bytes() if isinstance(image, Path) else image
        with Image.open(io.BytesIO(content), formats=tuple(PICTURE_FORMATS)) as picture:
            # Of a JPEG less is decoded, below; of any other format all, and copied on the way.
            check_pixels(picture, 1 if picture.format == "JPEG" else 2)
            side, kind = max(picture.size), Image.MIME.get(picture.format or "", "")
            is_turned = picture.getexif().get(0x0112, 1) != 1
            is_opaque = picture.mode in ("RGB", "L") and "transparency" not in picture.info
            if side > edge or kind not in KINDS or is_turned or not is_opaque or len(content) > SMALL_BYTES:
                picture.draft("RGB", (edge, edge))  # of a large JPEG only what is needed is decoded
                upright = ImageOps.exif_transpose(picture).convert("RGBA")
                upright.thumbnail((edge, edge))
                paper = Image.new("RGBA", upright.size, "white")
                paper.alpha_composite(upright)
                buffer = io.BytesIO()
                paper.convert("RGB").save(buffer, "JPEG", quality=82)
                kind, content = "image/jpeg", buffer.getvalue()
            else:
                picture.load()  # a file that is cut off is found here
    except UnidentifiedImageError:
        raise ValueError("not a picture") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except (SyntaxError, Image.DecompressionBombError) as error:  # a damaged PNG; a picture of absurd size
        raise ValueError(str(error)) from None
    return f"data:{kind};base64,{base64.b64encode(content).decode()}", side
