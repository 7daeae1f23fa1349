import io
import struct
import warnings
import zlib

import open_clip
import pytest
import torch
from PIL import Image

from mmcore.constants import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from mmcore.data.image import EXTENSIONS, MAX_PIXELS, decode_image, picture_extension, preprocess
from tests.data.fabricated import picture


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("image_size", [14, 56, 224])
@pytest.mark.parametrize("size", [(224, 224), (56, 56), (57, 56), (100, 37), (37, 101), (500, 333), (1, 3), (640, 427)])
def test_pixels_are_open_clips(size: tuple[int, int], image_size: int) -> None:
    image = decode_image(picture(sum(size), size))
    clip = open_clip.image_transform(image_size, is_train=False, mean=CLIP_IMAGE_MEAN, std=CLIP_IMAGE_STD)
    mean, std = (torch.tensor(value)[:, None, None] for value in (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD))
    expected = ((clip(image) * std + mean) * 255).round().to(torch.uint8)
    pixels = preprocess(image, image_size)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(kind: str) -> None:
    data = picture(1, kind=kind)
    assert picture_extension(data) == EXTENSIONS[kind]
    image = decode_image(data)
    assert image.mode == "RGB" and image.size == (20, 16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        encoded(Image.new("RGB", (4, 4)), "PPM"),
        encoded(Image.new("RGB", (4, 4)), "ICO"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    for read in (decode_image, picture_extension):
        with pytest.raises(ValueError, match="not a picture"):
            read(data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so before it gives up
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_picture_is_refused(kind: str) -> None:
    data = picture(2, (64, 64), kind)
    for length in (len(data) * 2 // 3, 30):
        with pytest.raises(ValueError):
            decode_image(data[:length])


def test_too_many_pixels_are_refused_before_decoding() -> None:
    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    def bomb(width: int, height: int) -> bytes:
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT" + zlib.compress(bytes(99)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for width, height in ((8193, 8192), (1, MAX_PIXELS + 1), (60000, 60000)):
            with pytest.raises(ValueError, match="pixels"):
                decode_image(bomb(width, height))
    with pytest.raises(ValueError, match="too long to be resized"):
        preprocess(Image.new("RGB", (1, 60000)), 336)


def test_modes_become_what_a_viewer_shows() -> None:
    grey = Image.new("L", (2, 1), 77)
    assert decode_image(encoded(grey)).getpixel((0, 0)) == (77, 77, 77)

    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encoded(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)

    transparent = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    transparent.putpixel((1, 0), (10, 20, 30, 255))
    shown = decode_image(encoded(transparent))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]

    deep = Image.new("I;16", (2, 1), 256 * 200 + 9)
    for kind in ("PNG", "TIFF"):
        assert decode_image(encoded(deep, kind)).getpixel((0, 0)) == (200, 200, 200)

    cmyk = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert cmyk.getpixel((4, 4)) == (255, 255, 255)

    with pytest.raises(ValueError, match="32 bits a channel"):
        decode_image(encoded(Image.new("F", (2, 1), 0.5), "TIFF"))


def test_a_turned_camera_is_turned_back() -> None:
    image = Image.new("RGB", (3, 2), (0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter
    for kind in ("PNG", "TIFF"):
        upright = decode_image(encoded(image, kind, exif=exif))
        assert upright.size == (2, 3) and upright.getpixel((1, 0)) == (255, 0, 0)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((1, 1)) == (255, 0, 0)
