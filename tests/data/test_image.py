import io
import struct
import warnings
import zlib
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmcore.constants import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from mmcore.data.image import EXTENSIONS, MAX_PIXELS, Mode, decode_image, picture_extension, picture_size, preprocess
from tests.data.fabricated import picture


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, color_type: int, rows: bytes) -> bytes:
    """A file that claims a size, over whatever rows (each a filter byte and pixels)."""

    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT" + zlib.compress(rows)) + chunk(b"IEND")


@pytest.mark.parametrize("image_size", [14, 56, 224])
@pytest.mark.parametrize("size", [(224, 224), (56, 56), (57, 56), (100, 37), (37, 101), (500, 333), (1, 3), (640, 427)])
def test_pixels_are_open_clips(size: tuple[int, int], image_size: int) -> None:
    image = decode_image(picture(sum(size), size))
    clip = open_clip.image_transform(image_size, is_train=False, mean=CLIP_IMAGE_MEAN, std=CLIP_IMAGE_STD)
    mean, std = (torch.tensor(value)[:, None, None] for value in (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD))
    expected = ((clip(image) * std + mean) * 255).round().to(torch.uint8)
    pixels = preprocess(image, image_size)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("mode", ["pad", "squash"])
@pytest.mark.parametrize("image_size", [14, 56, 224])
@pytest.mark.parametrize("size", [(56, 56), (57, 56), (100, 37), (37, 101), (500, 333), (5, 9), (640, 427)])
def test_other_squares_are_their_references(size: tuple[int, int], image_size: int, mode: Mode) -> None:
    image = decode_image(picture(sum(size), size))
    square = {"height": image_size, "width": image_size}
    raw: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
    reference = {
        "pad": LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": image_size}, crop_size=square, **raw),
        "squash": SiglipImageProcessorPil(size=square, **raw),
    }[mode]
    expected = torch.tensor(reference(image)["pixel_values"][0])
    pixels = preprocess(image, image_size, mode)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, expected)


def test_padding_has_clips_mean_colour_and_an_odd_rest_goes_last() -> None:
    shown = preprocess(Image.new("RGB", (4, 1), (255, 0, 0)), 4, "pad")
    red, mean = [255, 0, 0], [122, 116, 104]
    assert shown[:, :, 2].T.tolist() == [mean, red, mean, mean]


@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
def test_a_picture_of_one_pixel_fills_the_square(mode: Mode) -> None:
    pixels = preprocess(Image.new("RGB", (1, 1), (1, 2, 3)), 14, mode)
    assert torch.equal(pixels, torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 14, 14))


@pytest.mark.parametrize(
    "mode, size", [("crop", (1, 60000)), ("crop", (60000, 1)), ("pad", (8193, 1)), ("squash", (1, 200_000))]
)
def test_a_picture_too_long_is_refused(mode: Mode, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels is too long to be resized"):
        preprocess(Image.new("RGB", size), 336, mode)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for width, height in ((8193, 8192), (1, MAX_PIXELS + 1), (60000, 60000)):
            with pytest.raises(ValueError, match="pixels"):
                decode_image(png(width, height, 8, 2, bytes(99)))


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


def test_enormous_headers_of_other_formats() -> None:
    small = Image.new("RGB", (16, 16))
    side = 60000
    jpeg, gif, bmp = (
        bytearray(encoded(small, "JPEG")),
        bytearray(encoded(small, "GIF")),
        bytearray(encoded(small, "BMP")),
    )
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, side, side)
    struct.pack_into("<HH", gif, 6, side, side)
    struct.pack_into("<II", bmp, 18, side, side)
    entries = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 8)]
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    tiff += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    for data in (bytes(jpeg), bytes(gif), bytes(bmp), tiff):
        with pytest.raises(ValueError, match="pixels"):
            decode_image(data)


def test_transparency_by_a_colour_is_seen_in_every_mode() -> None:
    for image, clear in (
        (Image.new("RGB", (2, 1), (1, 2, 3)), (1, 2, 3)),
        (Image.new("L", (2, 1), 7), 7),
        (Image.new("1", (2, 1), 0), 0),
    ):
        assert decode_image(encoded(image, transparency=clear)).getpixel((0, 0)) == (255, 255, 255)
    faint = decode_image(encoded(Image.new("LA", (2, 1), (0, 51))))
    assert faint.getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_every_value_of_16_bits_is_scaled_to_8(mode: str) -> None:
    order = "<H" if mode == "I;16" else ">H"
    values = b"".join(struct.pack(order, value) for value in range(1 << 16))
    shown = decode_image(encoded(Image.frombytes(mode, (256, 256), values), "TIFF"))
    assert shown.tobytes() == bytes(value >> 8 for value in range(1 << 16) for _ in range(3))


@pytest.mark.parametrize("color_type, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_of_16_bits_a_channel(color_type: int, channels: int) -> None:
    pixel = [0xC8FF, 0x6401, 0x3280, 0xFFFF][:channels]
    if color_type == 4:
        pixel[-1] = 0xFFFF  # opaque
    shown = decode_image(png(1, 1, 16, color_type, struct.pack(f">B{channels}H", 0, *pixel)))
    assert shown.getpixel((0, 0)) == ((0xC8, 0x64, 0x32) if channels >= 3 else (0xC8, 0xC8, 0xC8))


def test_cmyk_and_ycck() -> None:
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 51))  # cyan and a fifth of black
    assert close(decode_image(encoded(cmyk, "JPEG", quality=100)), (0, 204, 204))

    # Adobe stores ink inverted. Written here as if the inks were brightness and colour, then named so.
    shown = (200, 100, 50)
    stored = Image.new("RGB", (16, 16), tuple(255 - value for value in shown)).convert("YCbCr").getpixel((0, 0))
    inks = Image.new("CMYK", (16, 16), (*(255 - value for value in stored), 0))
    data = bytearray(encoded(inks, "JPEG", quality=100))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2  # YCCK
    assert close(decode_image(bytes(data)), shown)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_size_is_in_the_header(kind: str) -> None:
    """So half a file tells it, which cannot be decoded."""
    data = encoded(Image.effect_noise((90, 60), 50).convert("RGB"), kind)
    assert picture_size(data) == (90, 60)
    if kind not in ("TIFF", "WEBP"):  # which have it, or more than half of theirs, at the end
        half = data[: len(data) // 2]
        assert picture_size(half) == (90, 60)
        with pytest.raises(ValueError, match="broken"):
            decode_image(half)


def close(image: Image.Image, color: tuple[int, ...]) -> bool:
    """Whether a picture of one colour shows it, but for JPEG's rounding."""
    return all(abs(seen - meant) <= 2 for seen, meant in zip(image.getpixel((5, 5)), color, strict=True))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_camera_is_turned_back(orientation: int, kind: str) -> None:
    """Against EXIF's own definition: which sides of the scene are the first row and column of the file."""
    stored = Image.frombytes("RGB", (3, 2), bytes(range(18)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(stored, kind, exif=exif, **options)
    upright = decode_image(data)
    assert picture_size(data) == upright.size
    first_row = ("top", "top", "bottom", "bottom", "left", "right", "right", "left")[orientation - 1]
    first_column = ("left", "right", "right", "left", "top", "top", "bottom", "bottom")[orientation - 1]
    assert upright.size == ((3, 2) if orientation < 5 else (2, 3))
    for row in range(2):
        for column in range(3):
            place = {first_row: row, first_column: column}  # steps from those sides
            x = place["left"] if "left" in place else upright.width - 1 - place["right"]
            y = place["top"] if "top" in place else upright.height - 1 - place["bottom"]
            assert upright.getpixel((x, y)) == stored.getpixel((column, row))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"abcd", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"])
def test_broken_exif_does_not_spoil_a_picture(exif: bytes, kind: str) -> None:
    data = encoded(Image.new("RGB", (3, 2)), kind, exif=exif)
    assert decode_image(data).size == picture_size(data) == (3, 2)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert decode_image(data).getpixel((1, 1)) == (255, 0, 0)
