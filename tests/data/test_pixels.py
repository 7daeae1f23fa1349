"""torch's way from a file to pixels against Pillow's: equal decoding, nearly equal resizing, the same refusals."""

import io
import random
import struct
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import pixels
from mmcore.data.image import Mode, decode_image, preprocess, resize, to_tensor
from mmcore.data.pixels import decode_pixels
from mmcore.data.tiling import anyres_layout, dynamic_layout, tiles
from tests.data.fabricated import picture


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft shapes under a little noise."""
    draw = random.Random(width * height)
    soft = Image.frombytes("RGB", (9, 7), draw.randbytes(189)).resize((width, height), Image.Resampling.BICUBIC)
    noise = Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height))
    return Image.blend(soft, noise, 0.1).convert(mode)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def differences(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Largest and mean."""
    assert first.dtype == second.dtype == torch.uint8 and first.shape == second.shape
    apart = (first.int() - second.int()).abs()
    return apart.max().item(), apart.float().mean().item()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}, {"quality": 20}, {"dpi": (300, 300)}])
@pytest.mark.parametrize(
    "mode, layout",
    [
        ("L", {}),
        ("RGB", {"keep_rgb": True, "subsampling": "4:4:4"}),
        *(("RGB", {"subsampling": subsampling}) for subsampling in ("4:4:4", "4:2:2", "4:2:0")),
    ],
)
def test_decoding_is_pillows(
    mode: str, layout: dict[str, Any], options: dict[str, Any], progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "decode_image", None)  # so that nothing falls back on it
    for size in ((1, 1), (3, 5), (17, 31), (64, 48), (101, 67), (320, 213)):
        data = jpeg(photograph(*size, mode), progressive=progressive, **layout, **options)
        assert torch.equal(decode_pixels(data), to_tensor(decode_image(data)))


SIZES = [(640, 480), (480, 640), (337, 337), (100, 700), (700, 100), (20, 30), (1, 1), (1, 50), (50, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_nearly_pillows(size: tuple[int, int]) -> None:
    """Of Pillow by one side after the other: from 13.0 on it may itself begin with the height of tall pictures."""
    image = Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))
    for width, height in ((336, 336), (448, 336), (336, 448), (56, 70)):
        by_width = image.resize((width, image.height), Image.Resampling.BICUBIC)
        expected = to_tensor(by_width.resize((width, height), Image.Resampling.BICUBIC))
        resized = resize(to_tensor(image), (width, height))
        largest, mean = differences(resized, expected)
        assert largest <= 2 and mean < 0.01


@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", SIZES)
def test_squares_are_nearly_pillows(size: tuple[int, int], mode: Mode) -> None:
    data = jpeg(photograph(*size))
    fast, exact = (preprocess(image, 224, mode, (9, 99, 199)) for image in (decode_pixels(data), decode_image(data)))
    assert fast.shape == (3, 224, 224) and fast.dtype == torch.uint8
    largest, mean = differences(fast, exact)
    is_tall = size[1] >= size[0]
    assert largest <= 2 and mean < (0.25 if is_tall else 0.05)


def test_tiles_are_nearly_pillows() -> None:
    data = jpeg(photograph(500, 300))
    for layout in (
        anyres_layout((500, 300), 56, 4, [(56, 112), (112, 112), (168, 56)]),
        dynamic_layout((500, 300), 56, 4, 6),
    ):
        fast, exact = (tiles(image, layout, 56) for image in (decode_pixels(data), decode_image(data)))
        assert len(fast) == layout.num_squares and fast.is_contiguous()
        largest, mean = differences(fast, exact)
        assert largest <= 2 and mean < 0.05


@pytest.mark.parametrize(
    "mode, shape", [("crop", (60000, 1)), ("crop", (1, 60000)), ("pad", (1, 8193)), ("squash", (200_000, 1))]
)
def test_a_picture_too_long_is_refused(mode: Mode, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{shape[1]} x {shape[0]} pixels is too long to be resized"):
        preprocess(torch.zeros(3, *shape, dtype=torch.uint8), 336, mode)


def ycck() -> bytes:
    """Inks named as brightness and colour."""
    data = bytearray(jpeg(Image.new("CMYK", (16, 16), (9, 99, 199, 0))))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(photograph(20, 30), exif=exif)


def several() -> bytes:
    buffer = io.BytesIO()
    photograph(20, 30).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "data",
    [
        *(picture(1, kind=kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF")),
        *map(turned, range(1, 9)),
        jpeg(photograph(20, 30), exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"),
        jpeg(Image.new("CMYK", (16, 16), (255, 0, 0, 51))),
        ycck(),
        several(),
        jpeg(photograph(20, 30)) + b"what a camera left behind",
    ],
)
def test_no_file_changes_its_meaning(data: bytes) -> None:
    assert torch.equal(decode_pixels(data), to_tensor(decode_image(data)))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused_in_pillows_words(progressive: bool) -> None:
    data = jpeg(photograph(24, 16), progressive=progressive)
    for length in range(len(data)):
        with pytest.raises(ValueError) as expected:
            decode_image(data[:length])
        with pytest.raises(ValueError) as refusal:
            decode_pixels(data[:length])
        assert str(refusal.value) == str(expected.value)


def test_damage_that_pillow_overlooks_looks_the_same_and_the_rest_is_refused() -> None:
    draw = random.Random(0)
    data = jpeg(photograph(24, 16))
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] = draw.randrange(256)
        try:
            expected = to_tensor(decode_image(bytes(damaged)))
        except ValueError:
            refused += 1
            with pytest.raises(ValueError):
                decode_pixels(bytes(damaged))
        else:
            assert torch.equal(decode_pixels(bytes(damaged)), expected)
    assert 0 < refused < 300


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\xff\xd8\xff\xe0", picture(2, (64, 64))[:999]])
def test_what_is_no_whole_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="picture"):
        decode_pixels(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 60000])
def test_too_many_pixels_are_refused_before_decoding(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "decode_jpeg", None)
    data = bytearray(jpeg(Image.new("RGB", (16, 16))))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, side, side)
    with pytest.raises(ValueError, match="pixels"):
        decode_pixels(bytes(data))
