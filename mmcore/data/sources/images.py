"""Where pictures lie: folders, zip files and tar files, all read by name and none unpacked.

An archive is indexed once, when it is opened; a picture is then one read at a known offset, which
does not move any position in the file, so that threads and processes share a store freely.
"""

import os
import stat
import struct
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, Protocol

from mmcore.foreign import MAX_PICTURE_BYTES

# APPNOTE.TXT 6.3.10, 4.3.7: a local header is 30 bytes, the lengths of name and extra field its last two numbers.
ZIP_LOCAL_HEADER = struct.Struct("<26xHH")
ZIP_ENCRYPTED = 1

# Of a tar's headers: names of a few hundred characters, and what extends them.
MAX_HEADER_BYTES = 1 << 20


class UnsafePathError(Exception):
    """A name that leads out of where the pictures lie."""


class Place(Protocol):
    path: Path

    def read(self, name: str) -> bytes:
        """Content of a picture; FileNotFoundError if there is none, another OSError if it cannot be read."""


@dataclass(slots=True)
class Folder:
    path: Path
    _root: Path = field(init=False)

    def __post_init__(self) -> None:
        self._root = self.path.resolve()

    def read(self, name: str) -> bytes:
        path = Path(os.path.realpath(self._root / name))  # a link inside may lead anywhere
        if not path.is_relative_to(self._root):
            raise UnsafePathError(name)
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise OSError(0, "no regular file")  # a folder, or a pipe that would be waited on for ever
        with path.open("rb") as file:
            data = file.read(MAX_PICTURE_BYTES + 1)
        _refuse_above_limit(len(data))
        return data


def _refuse_above_limit(size: int) -> None:
    if not 0 <= size <= MAX_PICTURE_BYTES:
        raise OSError(0, f"it has {size} bytes or more, and at most {MAX_PICTURE_BYTES} are read")


class Member(NamedTuple):
    offset: int
    """Of its content in a tar, of its local header in a zip."""
    size: int
    """In the archive, so after compression."""
    is_deflated: bool = False
    full_size: int = 0
    checksum: int = 0


class _Archive(ABC):
    """An archive's members by name; a pickled one opens its file again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members = self._index()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __getstate__(self) -> tuple[Path, dict[str, Member]]:
        return self.path, self.members

    def __setstate__(self, state: tuple[Path, dict[str, Member]]) -> None:
        self.path, self.members = state
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    @abstractmethod
    def _index(self) -> dict[str, Member]: ...

    def _find(self, name: str) -> Member:
        if name not in self.members:
            raise FileNotFoundError(2, os.strerror(2), f"{self.path}/{name}")
        return self.members[name]

    def _read_at(self, offset: int, size: int) -> bytes:
        _refuse_above_limit(size)
        data = os.pread(self._descriptor, size, offset)
        if len(data) < size:
            raise OSError(0, f"{self.path} ends early")
        return data


def _headers(file: IO[bytes]) -> Any:
    """A tar file for tarfile, which reads its headers, that may say that they are as long as they like."""

    def read(size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return file.read(size)

    return SimpleNamespace(read=read, seek=file.seek, tell=file.tell)


class Tar(_Archive):
    def _index(self) -> dict[str, Member]:
        end = self.path.stat().st_size
        try:
            with self.path.open("rb") as file, tarfile.open(fileobj=_headers(file), mode="r:") as tar:
                files = []
                for member in tar:
                    is_plain = member.isreg() and not member.issparse()
                    if tar.offset <= member.offset or (is_plain and member.size > end - member.offset_data):
                        raise tarfile.ReadError(f"{member.name} would have {member.size} bytes")
                    if is_plain:
                        files.append(member)
        except (tarfile.TarError, ArithmeticError, RecursionError, ValueError) as error:
            raise ValueError(
                f"{self.path} is no plain tar file ({error}): uncompress it first, single "
                "pictures cannot be read out of a compressed one"
            ) from None
        return {clean_name(member.name): Member(member.offset_data, member.size) for member in files}

    def read(self, name: str) -> bytes:
        member = self._find(name)
        return self._read_at(member.offset, member.size)


class Zip(_Archive):
    def _index(self) -> dict[str, Member]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                files = [info for info in archive.infolist() if not info.is_dir()]
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path} is a broken zip file ({error}): download it again") from None
        for info in files:
            if info.flag_bits & ZIP_ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{info.filename} in {self.path} is encrypted, or compressed by another method than "
                    "deflate: unpack the archive and name the folder"
                )
        return {
            clean_name(info.filename): Member(
                info.header_offset,
                info.compress_size,
                info.compress_type == zipfile.ZIP_DEFLATED,
                info.file_size,
                info.CRC,
            )
            for info in files
        }

    def read(self, name: str) -> bytes:
        member = self._find(name)
        _refuse_above_limit(member.full_size)
        header = self._read_at(member.offset, ZIP_LOCAL_HEADER.size)
        data = self._read_at(member.offset + len(header) + sum(ZIP_LOCAL_HEADER.unpack(header)), member.size)
        if member.is_deflated:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.full_size + 1)
            except zlib.error as error:
                raise OSError(0, f"broken in {self.path} ({error})") from None
        if len(data) != member.full_size or zlib.crc32(data) != member.checksum:
            raise OSError(0, f"broken in {self.path} (its checksum differs)")
        return data


@dataclass(frozen=True, slots=True)
class Mount:
    """A place, and the folder that it stands for in the pictures' names."""

    prefix: PurePosixPath
    place: Place


@dataclass(frozen=True, slots=True)
class ImageStore:
    """Several places, searched in order."""

    mounts: tuple[Mount, ...]

    def read(self, name: str) -> bytes:
        """Content of the first picture of that name.

        Raises:
            UnsafePathError: the name is absolute, or leads out of its folder by itself or by a link.
            FileNotFoundError: no place has it.
            OSError: it cannot be read.
        """
        if not name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UnsafePathError(name)
        path = PurePosixPath(name)
        for mount in self.mounts:
            if path.is_relative_to(mount.prefix):
                try:
                    return mount.place.read(str(path.relative_to(mount.prefix)))
                except FileNotFoundError:
                    continue
        raise FileNotFoundError(2, os.strerror(2), name)


def open_images(paths: Sequence[str]) -> ImageStore:
    """Open what `--images` names.

    Args:
        paths: each a folder, a zip or a tar file; `PREFIX=PATH` puts one below a folder, so that
            `coco=train2017.zip` holds `coco/train2017/000000000009.jpg`.
    Raises:
        ValueError: one is missing, or neither a folder nor an archive that can be read.
    """
    return ImageStore(tuple(_open_mount(path) for path in paths))


def clean_name(name: str) -> str:
    """One spelling of a path in an archive: `./a//b` is `a/b`."""
    return str(PurePosixPath(name))


def _open_mount(text: str) -> Mount:
    prefix, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        prefix, rest = "", text
    return Mount(PurePosixPath(prefix), _open_place(Path(rest)))


def _open_place(path: Path) -> Place:
    if path.is_dir():
        return Folder(path)
    try:
        return Zip(path) if zipfile.is_zipfile(path) else Tar(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): --images names folders, zip and tar files of pictures"
        ) from None
