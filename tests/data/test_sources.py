"""Where pictures come from, and rows of every form, without the command around them."""

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from mmcore.data.sources.images import ImageStore, UnsafePathError, open_images

FILES = {"a.png": b"first" * 400, "sub/b.jpg": os.urandom(3000), "sub/empty": b""}


def write_folder(path: Path) -> Path:
    for name, data in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path: Path, method: int) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("sub/", b"")
        for name, data in FILES.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in FILES.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(params=["folder", "stored", "deflated", "tar"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "folder":
        return write_folder(tmp_path / "folder")
    if request.param == "tar":
        return write_tar(tmp_path / "images.tar")
    return write_zip(tmp_path / "images.zip", zipfile.ZIP_STORED if request.param == "stored" else zipfile.ZIP_DEFLATED)


def read_all(store: ImageStore) -> dict[str, bytes]:
    return {name: store.read(name) for name in reversed(FILES)}


def test_every_place_gives_the_files_own_bytes_by_name(place: Path) -> None:
    store = open_images([str(place)])
    assert read_all(store) == FILES == read_all(pickle.loads(pickle.dumps(store)))
    assert store.read("./sub//b.jpg") == FILES["sub/b.jpg"]
    with pytest.raises(FileNotFoundError):
        store.read("b.jpg")
    with pytest.raises(OSError):
        store.read("sub")


@pytest.mark.parametrize("name", ["/etc/hostname", "../images/a.png", "sub/../a.png", "a\0.png", ""])
def test_no_name_leads_out(place: Path, name: str) -> None:
    with pytest.raises(UnsafePathError):
        open_images([str(place)]).read(name)


def test_a_link_that_leads_out_is_not_followed_and_one_that_stays_is(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    (folder / "in").symlink_to("sub/b.jpg")
    os.mkfifo(folder / "pipe")
    (tmp_path / "folder link").symlink_to(folder)
    store = open_images([str(tmp_path / "folder link")])
    assert store.read("in") == FILES["sub/b.jpg"]
    for name in ("out", "up/secret"):
        with pytest.raises(UnsafePathError):
            store.read(name)
    with pytest.raises(OSError, match="no regular file"):
        store.read("pipe")


def test_places_are_searched_in_order_each_below_its_prefix(tmp_path: Path) -> None:
    folder, tar = write_folder(tmp_path / "folder"), write_tar(tmp_path / "images.tar")
    (folder / "a.png").write_bytes(b"of the folder")
    store = open_images([f"coco={tar}", str(folder), str(tar)])
    assert store.read("coco/a.png") == FILES["a.png"]
    assert store.read("a.png") == b"of the folder"
    (folder / "sub/b.jpg").unlink()
    assert store.read("sub/b.jpg") == FILES["sub/b.jpg"]
    with pytest.raises(FileNotFoundError):
        store.read("cocoa/a.png")
    odd = write_folder(tmp_path / "size=224")
    assert open_images([str(odd)]).read("a.png") == FILES["a.png"]


def test_a_damaged_member_is_found(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(tmp_path / f"{method}.zip", method)
        data = bytearray(path.read_bytes())
        start = data.index(b"sub/b.jpg") + len(b"sub/b.jpg")
        data[start + 1000] ^= 0xFF
        path.write_bytes(data)
        store = open_images([str(path)])
        assert store.read("a.png") == FILES["a.png"]
        with pytest.raises(OSError, match="broken in"):
            store.read("sub/b.jpg")


def test_what_cannot_be_read_by_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere cannot be read .* --images names folders, zip and tar files"):
        open_images([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="uncompress it first"):
        open_images([str(write_tar(tmp_path / "images.tar.gz", "w:gz"))])
    (tmp_path / "text").write_text("no archive" * 100)
    with pytest.raises(ValueError, match="no plain tar file"):
        open_images([str(tmp_path / "text")])
    with pytest.raises(ValueError, match="another method than deflate"):
        open_images([str(write_zip(tmp_path / "lzma.zip", zipfile.ZIP_LZMA))])
