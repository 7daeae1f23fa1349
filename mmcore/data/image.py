"""Pictures: from bytes of a file to the pixels that a vision tower takes."""

import io
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

# What Pillow may try, and the extension that a sample of a shard has for it. Pillow knows dozens more,
# some of which run other programs (EPS).
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
EXTENSIONS = FORMATS | {"MPO": "jpg"}  # several JPEGs in one file, as some cameras write it; opened as JPEG

# Checked before anything is decoded: a file of a few kilobytes can stand for gigabytes of pixels.
MAX_PIXELS = 1 << 26

WHITE = (255, 255, 255, 255)


def picture_extension(data: bytes) -> str:
    """File extension, without the dot, of a picture's format; reads the header only.

    Raises:
        ValueError: see `decode_image`.
    """
    return EXTENSIONS[str(_open(data).format)]


def decode_image(data: bytes) -> Image.Image:
    """Decode a picture file, of an animation the first frame.

    As a viewer shows it: turned as its EXIF says, palettes and CMYK resolved, transparent parts on
    white, 16 bits a channel scaled to 8.

    Args:
        data: content of a JPEG, PNG, WEBP, GIF, BMP or TIFF file.
    Returns:
        The picture in mode RGB.
    Raises:
        ValueError: not such a file, broken, too many pixels, or 32 bits a channel.
    """
    image = _open(data)
    try:
        image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"a broken {image.format or ''} picture ({error})") from None


def preprocess(image: Image.Image, image_size: int) -> "Tensor":
    """Resize the shorter side and crop the centre, as CLIP was trained to see pictures.

    Not normalised: the model does that where it runs, and bytes travel four times as fast as floats.

    Args:
        image: mode RGB.
        image_size: height and width of the result.
    Returns:
        uint8 [3, image_size, image_size].
    Raises:
        ValueError: so long and narrow that resized it would have more than MAX_PIXELS.
    Source: open_clip.image_transform(is_train=False) at 3.3.0 up to its ToTensor, the same pixels.
    """
    import torch  # here, because `mmcore prepare` decodes pictures without ever needing it

    width, height = image.size
    if min(width, height) != image_size:
        # By integers and rounded down, as torchvision's Resize.
        long = int(image_size * max(width, height) / min(width, height))
        if long * image_size > MAX_PIXELS:
            raise ValueError(f"a picture of {width} x {height} pixels is too long to be resized")
        width, height = (long, image_size) if width > height else (image_size, long)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if width != height:
        left, top = round((width - image_size) / 2), round((height - image_size) / 2)
        image = image.crop((left, top, left + image_size, top + image_size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image_size, image_size, 3).permute(2, 0, 1).contiguous()  # [3, h, w]


def _open(data: bytes) -> Image.Image:
    """Read the header only."""
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except (Image.UnidentifiedImageError, EOFError):
        raise ValueError(f"not a picture: {len(data)} bytes that are none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"a picture of too many pixels ({error})") from None
    except Exception as error:  # as in decode_image: a header can be broken too
        raise ValueError(f"a broken picture ({error})") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"a picture of {image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value / 256, "L").convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a channel, whose range is not known")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, WHITE)
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
