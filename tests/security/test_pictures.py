"""Pictures that are all promise, and archives and annotations that they come in: refused before they are decoded."""

import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmcore import foreign
from mmcore.data.image import MAX_PIXELS, decode_image, preprocess
from mmcore.data.pixels import decode_pixels
from mmcore.data.shards import ShardWriter
from mmcore.data.sources import images as images_module
from mmcore.data.sources import jsonl
from mmcore.data.sources.dataset import write_dataset
from mmcore.data.sources.images import open_images
from mmcore.data.sources.row import read_json
from mmcore.evaluation.thumbnail import data_uri
from mmcore.foreign import MAX_LINE_BYTES
from tests.data import fabricated
from tests.security.payloads import chunk, member, png, tiff, zeros, zip_bomb
from tests.security.sandbox import opened

SIDE = 1 << 13  # the largest square that is decoded
EXIF = chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")  # lies on its side


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


def encoded(kind: str, size: tuple[int, int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind, **options)
    return buffer.getvalue()


def gif(width: int, height: int) -> bytes:
    """Of a tiny file, only the size that it promises is changed."""
    data = bytearray(encoded("GIF", (1, 1)))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    data = bytearray(encoded("BMP", (1, 1)))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(encoded("JPEG", (8, 8)))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def in_tiles(side: int) -> bytes:
    """A picture of 16 x 16 pixels in one tile of many."""
    data = zeros(1 << 20, lambda: zlib.compressobj(1))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: -1, 325: len(data)}
    return tiff(tags, data)


BROKEN = encoded("JPEG", (64, 64))[:300]
PICTURES = {
    "PNG of 50000 x 50000": (png(50_000, 50_000, rows=1), "pixels"),
    "PNG of a pixel more than is decoded": (png(SIDE, SIDE + 1, rows=1), "pixels; at most"),
    "PNG of 2^31 columns": (png((1 << 31) - 1, 1, rows=0), "pixels"),
    "PNG that ends early": (fabricated.picture(1)[:200], "broken"),
    "PNG with a text of many megabytes": (
        png(4, 4, chunks=chunk(b"zTXt", b"a\0\0" + zeros(1 << 27, lambda: zlib.compressobj(1)))),
        "broken|Decompressed",
    ),
    "GIF of 65535 x 65535": (gif(65_535, 65_535), "pixels"),
    "BMP of 60000 x 60000": (bmp(60_000, 60_000), "pixels"),
    "JPEG of 65500 x 65500": (jpeg(65_500, 65_500), "pixels"),
    "JPEG that ends early": (BROKEN, "broken"),
    "WEBP of twice what is decoded": (encoded("WEBP", (16_383, 2049), lossless=True), "pixels"),
    "TIFF of 50000 x 50000": (tiff({256: 50_000, 257: 50_000, 258: 8, 259: 1, 262: 1, 273: -1, 279: 9}), "pixels"),
    "TIFF in huge tiles": (in_tiles(1 << 14), "in tiles of 16384 x 16384"),
    "PSD": (b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(40), "not a picture"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(marker) (w) file\n", "not a picture"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "not a picture"),
    "ICO": (encoded("ICO", (16, 16)), "not a picture"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(80), "not a picture"),
    "nothing": (b"", "not a picture"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_hostile_picture_is_refused(folder: Path, name: str) -> None:
    """By training's decoder, by all others, and by pages that show pictures."""
    data, told = PICTURES[name]

    def refusals() -> list[str]:
        found = []
        for decode in (decode_image, decode_pixels, lambda data: data_uri(data, 320)):
            with pytest.raises(ValueError) as raised:
                decode(data)
            found.append(str(raised.value))
        return found

    outcome = opened(folder, refusals)
    assert outcome.startswith("done: ") and any(word in outcome for word in told.split("|")), outcome


def test_the_largest_pictures_take_less_than_a_gigabyte(folder: Path) -> None:
    """Where most copies are made: transparent and lying on its side; and Pillow's own of WEBP."""
    assert SIDE * SIDE == MAX_PIXELS
    turned, webp = png(SIDE, SIDE, chunks=EXIF), encoded("WEBP", (5792, 5792), method=0)
    for data in (turned, webp):
        outcome = opened(folder, lambda data=data: preprocess(decode_image(data), 336).shape)
        assert outcome == "done: torch.Size([3, 336, 336])"


GOOD = member("a.png", fabricated.picture(1))
# Archives of pictures, with what is told of them when picture `a.png` is wanted.
STORES = {
    "a tar that leads back for ever": (GOOD + member("b.png", size=-1536), "no plain tar"),
    "a tar with a sparse file that leads back": (GOOD + member("b.png", type=b"S", size=-1024), "no plain tar"),
    "a tar with a file of terabytes": (GOOD + member("b.png", size=1 << 42), "no plain tar"),
    "a tar with a header of gigabytes": (member("x", type=tarfile.XHDTYPE, size=1 << 34) + GOOD, "no plain tar"),
    "a tar of names of names": (
        member("././@LongLink", b"x\0", type=tarfile.GNUTYPE_LONGNAME) * 2000 + GOOD,
        "no plain tar",
    ),
    "a tar with a link for it": (member("a.png", type=tarfile.SYMTYPE, linkname="/etc/hostname"), "FileNotFound"),
    "a tar with it elsewhere": (member("../a.png", b"x"), "FileNotFound"),
    "a zip of more than is read": (zip_bomb("a.png", 1 << 24), f"at most {1 << 23}"),
}


@pytest.mark.parametrize("name", STORES)
def test_a_hostile_archive_of_pictures(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_PICTURE_BYTES", 1 << 23)  # rather than a bomb that takes long to make
    data, told = STORES[name]
    (folder / "archive").write_bytes(data + (b"" if "zip" in name else bytes(1024)))
    outcome = opened(folder, lambda: len(open_images([str(folder / "archive")]).read("a.png")))
    assert told in outcome, outcome


def test_a_zip_that_lies_about_sizes(folder: Path) -> None:
    """It promises a kilobyte, and holds many megabytes."""
    data = zip_bomb("a.png", 17 << 20)
    size, short = struct.pack("<I", 17 << 20), struct.pack("<I", 1 << 10)
    assert data.count(size) == 2
    (folder / "a.zip").write_bytes(data.replace(size, short))
    outcome = opened(folder, lambda: open_images([str(folder / "a.zip")]).read("a.png"), most=1 << 23)
    assert "broken" in outcome


def test_a_folder_of_links_pipes_and_holes(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "link.png").symlink_to("/etc/hostname")
    (folder / "images" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "images" / "pipe.png")
    with (folder / "images" / "hole.png").open("wb") as file:
        file.truncate(1 << 40)
    images = open_images([str(folder / "images")])
    for name, told in (("link", "UnsafePath"), ("zero", "UnsafePath"), ("pipe", "regular"), ("hole", "at most")):
        assert told in opened(folder, lambda name=name: images.read(f"{name}.png")), name
    for name in ("../a.png", "/etc/hostname", "a/../../x", "\0"):
        assert "UnsafePath" in opened(folder, lambda name=name: images.read(name))


LINE = json.dumps({"text": "A cat."}).encode() + b"\n"


# Files of JSON Lines, with what is told of them.
ANNOTATIONS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "many megabytes in gzip": (
        "a.jsonl.gz",
        lambda: zeros(1 << 26, lambda: zlib.compressobj(1, zlib.DEFLATED, 31)),
        "bytes or more",
    ),
    "many short lines in gzip": ("a.jsonl.gz", lambda: gzip.compress(b"{}\n" * (1 << 18)), "unpack to"),
    "many megabytes in zip": ("a.zip", lambda: zip_bomb("a.jsonl", 1 << 25), "bytes or more"),
    "a zip that leads up": ("a.zip", lambda: zip_bomb("../../marker", 0, ("b.jsonl", LINE)), "holds 2 files"),
    "a gzip that ends early": ("a.jsonl.gz", lambda: gzip.compress(LINE * 100)[:-20], "cannot be read"),
    "a long line": ("a.jsonl", lambda: b" " * (MAX_LINE_BYTES + 1), "bytes or more"),
    "deep JSON": ("a.jsonl", lambda: LINE + b"[" * 100_000, "[None, 'not JSON"),
    "a number of a million digits": ("a.jsonl", lambda: LINE + b"1" * 1_000_000, "[None, 'not JSON"),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_hostile_annotations(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "FREE_BYTES", 1 << 17)  # rather than a bomb that takes long to make
    file, data, told = ANNOTATIONS[name]
    (folder / file).write_bytes(data())
    outcome = opened(folder, lambda: [row.fault for row in jsonl.read_rows(folder / file)])
    assert told in outcome, outcome


def test_deep_annotations(folder: Path) -> None:
    (folder / "a.json").write_bytes(b"[" * 100_000)
    assert opened(folder, lambda: read_json(folder / "a.json")).startswith("ValueError: ")


def test_what_is_prepared_of_them(tmp_path: Path) -> None:
    """Hostile rows are counted by their reason, and nothing is written but the dataset."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.png").write_bytes(fabricated.picture(1))
    (tmp_path / "images" / "bomb.png").write_bytes(png(50_000, 50_000, rows=1))
    (tmp_path / "images" / "link.png").symlink_to("/etc/hostname")
    talk = fabricated.conversation("<image>\nWhat?", "It.")
    names = ("good.png", "bomb.png", "link.png", "../images/good.png", "/etc/hostname")
    lines = [json.dumps({"image": name, "conversations": talk}) for name in names] + ["[" * 100_000]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = write_dataset(
        "jsonl",
        {"train": [tmp_path / "a.jsonl"]},
        open_images([str(tmp_path / "images")]),
        ShardWriter(tmp_path / "out"),
        max_rejected=0.99,
    )
    assert report.kept == {"train": 1}
    assert report.rejected == {"not a picture": 1, "unsafe path": 3, "format": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "images", "out"}


def test_honest_archives_are_read(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", fabricated.picture(1))
        archive.writestr("blank.bmp", encoded("BMP", (2000, 2000)))  # a thousandth of its size
    (folder / "a.tar").write_bytes(member("d", type=tarfile.DIRTYPE) + GOOD + bytes(1024))
    for name in ("a.zip", "a.tar"):
        assert open_images([str(folder / name)]).read("a.png") == fabricated.picture(1)
    assert decode_image(open_images([str(folder / "a.zip")]).read("blank.bmp")).size == (2000, 2000)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINE * 1000))
    assert len(jsonl.read_rows(folder / "a.jsonl.gz")) == 1000
