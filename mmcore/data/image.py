"""Pictures: from bytes of a file to the pixels that a vision tower takes."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

from PIL import ExifTags, Image

from mmcore.constants import CLIP_IMAGE_MEAN
from mmcore.foreign import MAX_PIXELS, PICTURE_FORMATS, check_pixels

if TYPE_CHECKING:
    from torch import Tensor

EXTENSIONS = PICTURE_FORMATS | {"MPO": "jpg"}  # several JPEGs in one file, as some cameras write it; opened as JPEG

# Pixels that are laid on white at a time.
STRIP_PIXELS = 1 << 20

WHITE = (255, 255, 255, 255)
BACKGROUND = tuple(int(255 * value) for value in CLIP_IMAGE_MEAN)

# What puts a picture upright, by its EXIF orientation; 1 is upright already.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Mode = Literal["crop", "pad", "squash"]

# Pillow's, mode RGB, which Pillow resizes as towers were trained to see pictures; or uint8 [3, h, w], which torch
# resizes in a fifth of the time: see mmcore.data.pixels.
Picture: TypeAlias = Union[Image.Image, "Tensor"]

# What a PNG says somewhere if it says how it is to be turned. Pillow decodes all of it to look.
PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def picture_extension(data: bytes) -> str:
    """File extension, without the dot, of a picture's format; reads the header only.

    Raises:
        ValueError: see `decode_image`.
    """
    return EXTENSIONS[str(_open(data).format)]


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height that `decode_image` will find; reads the header only.

    Raises:
        ValueError: see `decode_image`.
    """
    image = _open(data)
    if image.format == "PNG" and not any(mark in data for mark in PNG_EXIF):
        return image.size
    if image.format == "TIFF":  # which Pillow turns itself
        return image.size
    return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a file is a JPEG that any decoder reads as `decode_image` does; reads the header only.

    That is RGB or grey, and upright.

    Raises:
        ValueError: see `decode_image`.
    """
    image = _open(data)
    return image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) not in TURNS


def decode_image(data: bytes) -> Image.Image:
    """Decode a picture file, of an animation the first frame.

    As a viewer shows it: turned as its EXIF says (left as it is where that cannot be read), palettes
    and CMYK resolved, transparent parts on white, 16 bits a channel scaled to 8.

    Args:
        data: content of a JPEG, PNG, WEBP, GIF, BMP or TIFF file.
    Returns:
        The picture in mode RGB.
    Raises:
        ValueError: not such a file, broken, too many pixels, or 32 bits a channel.
    """
    image = _open(data)
    try:
        image.load()
        return _to_rgb(_upright(image))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"a broken {image.format} picture ({error})") from None


def preprocess(
    image: Picture, image_size: int, mode: Mode = "crop", background: tuple[int, ...] = BACKGROUND
) -> "Tensor":
    """A picture as the square that a vision tower takes.

    Not normalised: the model does that where it runs, and bytes travel four times as fast as floats.

    Args:
        image: mode RGB, or its pixels.
        image_size: height and width of the result.
        mode: what becomes of a picture that is not square; see MODES.
        background: colour that "pad" puts beside it.
    Returns:
        uint8 [3, image_size, image_size], not contiguous: what joins pictures copies them anyhow.
    Raises:
        ValueError: so long and narrow that on the way it would have more than MAX_PIXELS.
    """
    return pad(image, image_size, background) if mode == "pad" else MODES[mode](image, image_size)


def crop(image: Picture, image_size: int) -> "Tensor":
    """Resize the shorter side and cut the centre out, as CLIP was trained to see pictures.

    Source: open_clip.image_transform(is_train=False) at 3.3.0 up to its ToTensor, the same pixels.
    """
    width, height = _size(image)
    # By integers and rounded down, as torchvision's Resize.
    long = int(image_size * max(width, height) / min(width, height))
    width, height = (long, image_size) if width > height else (image_size, long)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return resize(image, (width, height))[:, top : top + image_size, left : left + image_size]


def pad(image: Picture, image_size: int, background: tuple[int, ...] = BACKGROUND) -> "Tensor":
    """Centre on a square of the tower's mean colour, then resize: nothing is cut off, nothing is stretched.

    Source: LLaVA-1.5, expand2square; the same pixels as transformers' LlavaImageProcessor(do_pad=True).
    """
    side = max(_size(image))
    _refuse_above_limit(image, side * side)
    return resize(_on_square(image, side, background), (image_size, image_size))


def squash(image: Picture, image_size: int) -> "Tensor":
    """Resize both sides, whatever becomes of the proportions.

    Source: SigLIP, and Megatron-LM's multimodal example; the same pixels as transformers' SiglipImageProcessor.
    """
    return resize(image, (image_size, image_size))


MODES: dict[Mode, Callable[[Picture, int], "Tensor"]] = {"crop": crop, "pad": pad, "squash": squash}


def resize(image: Picture, size: tuple[int, int]) -> "Tensor":
    """Bicubic, to a width and height.

    Returns:
        uint8 [3, height, width], as it lies in memory.
    Raises:
        ValueError: it would take more than MAX_PIXELS.
    """
    # The picture between has the new width and the old height. (Where Pillow 13 begins with the height, it shrinks it.)
    _refuse_above_limit(image, size[0] * max(size[1], _size(image)[1]))
    if isinstance(image, Image.Image):
        return to_tensor(image.resize(size, Image.Resampling.BICUBIC))
    from torch.nn.functional import interpolate

    # Taken apart and put together, so that torch sees the channels lie last and takes its fastest way.
    pixels = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # [1, 3, h, w]
    return interpolate(pixels, size[::-1], mode="bicubic", antialias=True)[0]


def to_tensor(image: Image.Image) -> "Tensor":
    """Pixels of a picture in mode RGB: uint8 [3, h, w], in memory [h, w, 3]."""
    import torch  # here, because `mmcore prepare` decodes pictures without ever needing it

    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)  # [3, h, w]


def _on_square(image: Picture, side: int, background: tuple[int, ...]) -> Picture:
    width, height = _size(image)
    left, top = (side - width) // 2, (side - height) // 2
    if isinstance(image, Image.Image):
        square = Image.new("RGB", (side, side), background)
        square.paste(image, (left, top))
        return square
    pixels = image.new_tensor(background).repeat(side, side, 1)  # [side, side, 3]
    pixels[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return pixels.permute(2, 0, 1)


def _size(image: Picture) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])


def _refuse_above_limit(image: Picture, num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        width, height = _size(image)
        raise ValueError(f"a picture of {width} x {height} pixels is too long to be resized")


def _open(data: bytes) -> Image.Image:
    """Read the header only."""
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(PICTURE_FORMATS))
    except (Image.UnidentifiedImageError, EOFError):
        raise ValueError(f"not a picture: {len(data)} bytes that are none of {', '.join(PICTURE_FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"a picture of too many pixels ({error})") from None
    except Exception as error:  # as in decode_image: a header can be broken too
        raise ValueError(f"a broken picture ({error})") from None
    check_pixels(image)
    return image


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also rewrites the EXIF, and gives the picture up over a broken one.
    orientation = _orientation(image)
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _orientation(image: Image.Image) -> Any:
    """What the EXIF says, which need not be one of TURNS; None where it cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as in decode_image; the pixels are whole
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a channel, whose range is not known")
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """In strips, for on the way to it a large picture would be in memory five times."""
    canvas = Image.new("RGB", image.size)
    height = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height))).convert("RGBA")
        canvas.paste(Image.alpha_composite(Image.new("RGBA", strip.size, WHITE), strip).convert("RGB"), (0, top))
    return canvas
