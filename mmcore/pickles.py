"""Pickles, which are read here and nowhere else: nothing that a file names is imported, called or changed.

torch keeps tensors, and the description of a distributed checkpoint, as pickles. Such a file may name any function
and have it called; torch's own reader of descriptions lets it, and megatron-core's lets the objects among the shards.
Here names are looked up in lists of what torch's writers need, whole: one with dots would reach into a module.

Memory is guarded as well. Python's reader in C makes a table as long as a number in the file says (`LONG_BINPUT`:
six bytes for 64 GB), so its equal in Python is taken, without the opcode that reserves bytes that need not follow. Of
archives nothing is unpacked, tensors are views of the file, and none is larger than what is stored of it.

Source: torch distributed/checkpoint/filesystem.py, _write_item; serialization.py, _save and _legacy_save, at 2.11.0.
"""

import io
import math
import mmap
import pickle  # nosec B403
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

# Of one pickle. A description holds some hundred bytes for each piece of each tensor.
MAX_BYTES = 1 << 28
# A file that is read as a whole: what it holds is kept when the file is gone.
SMALL_BYTES = 1 << 22
MAX_MODULES, MAX_NAME = 1 << 14, 1 << 10

_DESCRIPTION_NAMES = {
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.serialization": ("_get_layout",),
}
_STORAGE_DTYPES = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    ("torch.storage", "UntypedStorage"): torch.uint8,  # of dtypes that have no storage of their own
}


class ForeignNameError(pickle.UnpicklingError):
    """A pickle names what its kind has no use for."""


class _Reader(pickle._Unpickler):
    """Reads plain data, and what `find_class` of a subclass knows."""

    def find_class(self, module: str, name: str) -> Any:
        raise ForeignNameError(f"{module}.{name} is not plain data")

    def load_build(self) -> None:
        owner = self.stack[-2]  # type: ignore[attr-defined]
        if callable(owner) or isinstance(owner, Enum):  # what all of the program shares
            raise pickle.UnpicklingError(f"it would change {owner!r}")
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[Any] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
    del dispatch[pickle.BYTEARRAY8[0]]


def read_description(folder: Path) -> Metadata:
    """Read a distributed checkpoint's .metadata: which tensors there are, and where their pieces lie.

    Raises:
        ValueError: it is damaged, names something else than torch's writer does, places a piece outside of the
            folder's files, or tells of more than they hold.
    """
    path = folder / ".metadata"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise pickle.UnpicklingError(f"it is larger than {MAX_BYTES} bytes")
        description = _DescriptionReader(io.BytesIO(path.read_bytes())).load()
        if not isinstance(description, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(description).__name__}")
        _check_places(description, folder)
    except Exception as error:  # a damaged pickle can raise any
        raise ValueError(
            f"{path} cannot be read as the description of a checkpoint ({error}): take another checkpoint, from where "
            "you trust what you get"
        ) from None
    return description


class _DescriptionReader(_Reader):
    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIPTION_NAMES.get(module, ()) or _is_dtype(module, name):
            return pickle._Unpickler.find_class(self, module, name)
        raise ForeignNameError(f"{module}.{name} is not part of a checkpoint's description")


def _is_dtype(module: str, name: str) -> bool:
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def _check_places(description: Metadata, folder: Path) -> None:
    sizes: dict[str, int] = {}
    for place in (description.storage_data or {}).values():
        name = place.relative_path
        if not isinstance(name, str) or name != Path(name).name:
            raise ValueError(f"it places a tensor in {name!r}, which is no file of the folder")
        if place.transform_descriptors:
            raise ValueError(f"it wants {place.transform_descriptors} to read {name}, and shards are read as they are")
        if name not in sizes:
            sizes[name] = (folder / name).stat().st_size
        if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[name]:
            raise ValueError(f"it places a tensor beyond the end of {name}")
    for key, tensor in description.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            places = (description.storage_data[MetadataIndex(key, chunk.offsets)] for chunk in tensor.chunks)
            stored = sum({(place.relative_path, place.offset): place.length for place in places}.values())
            size = math.prod(max(1, length) for length in tensor.size) * tensor.properties.dtype.itemsize
            if size > max(stored, 1 << 24):  # an empty tensor may be long
                raise ValueError(f"{key} would have {size} bytes, and {stored} are stored")


def read_tensor(path: Path, offset: int, length: int) -> Tensor:
    """A tensor that torch.save left in a part of a file: a view of the file, which is not copied.

    Raises:
        ValueError: it is damaged, or holds something else than a tensor.
    """
    try:
        with path.open("rb") as file:
            view = _View.of(file, offset, length)
        view.madvise(mmap.MADV_WILLNEED)  # else it comes from the disk page by page, as it is looked at
        tensor = _TensorReader(view).load()
        if not isinstance(tensor, Tensor):
            raise pickle.UnpicklingError(f"a {type(tensor).__name__}")
        return tensor
    except Exception as error:  # a damaged pickle can raise any
        raise ValueError(f"{path} is damaged: no tensor at byte {offset} ({error})") from None


def read_state(source: Path | io.BytesIO) -> Any:
    """What torch.save wrote: tensors, in plain data; those of a large file are views of it, which is not copied.

    Raises:
        ValueError: it cannot be read, is damaged, or holds more than that.
    """
    try:
        if not zipfile.is_zipfile(source):
            return _read_legacy(source)
        if isinstance(source, io.BytesIO):
            return _TensorReader(source.getbuffer()).load()
        if (size := source.stat().st_size) <= SMALL_BYTES:
            return _TensorReader(bytearray(source.read_bytes())).load()
        with source.open("rb") as file:
            return _TensorReader(_View.of(file, 0, size)).load()
    except OSError as error:
        raise ValueError(f"{_name(source)} cannot be read ({error.strerror})") from None
    except ForeignNameError as error:
        raise ValueError(
            f"{_name(source)} is refused: it holds more than tensors and plain data, and reading it would run code "
            f"that it names ({error}). Save it as safetensors where you trust it"
        ) from None
    except Exception as error:  # a damaged pickle can raise any
        raise ValueError(f"{_name(source)} is damaged, or not a file that torch.save wrote ({error})") from None


def read_modules(path: Path) -> dict[str, Tensor]:
    """The state dict of a TorchScript archive, whose code is not even looked at.

    Raises:
        ValueError: it is damaged, or holds something else than modules, tensors and plain values.
    """
    try:
        with path.open("rb") as file:
            return _tensors(_ModuleReader(_View.of(file, 0, path.stat().st_size)).load())
    except Exception as error:  # a damaged pickle can raise any
        raise ValueError(f"{path} cannot be read as a TorchScript archive of weights ({error})") from None


def _name(source: Path | io.BytesIO) -> str:
    return str(source) if isinstance(source, Path) else "an object of the checkpoint"


class _View(mmap.mmap):
    """A part of a file, as zipfile takes it."""

    @classmethod
    def of(cls, file: BinaryIO, offset: int, length: int) -> "_View":
        before = offset % mmap.ALLOCATIONGRANULARITY  # which zipfile passes over
        # Copied where it is written to, which nobody does: torch takes no view that is only for reading.
        return cls(file.fileno(), before + length, offset=offset - before, access=mmap.ACCESS_COPY)

    def seekable(self) -> bool:
        return True


class _TensorReader(_Reader):
    """Reads the zip archive that torch.save writes, in which tensors are stored as they are."""

    def __init__(self, view: Any) -> None:
        file: Any = view if isinstance(view, _View) else io.BytesIO(view)
        self.view, self.archive = view, zipfile.ZipFile(file)
        self.root = self.archive.namelist()[0].split("/")[0]
        super().__init__(io.BytesIO(view[self._place("data.pkl")]))

    def _place(self, name: str) -> slice:
        """Where a file of the archive lies in the view."""
        entry = self.archive.getinfo(f"{self.root}/{name}")
        # Its bytes follow a header of 30, at whose end stand the lengths of a name and of padding, and these.
        lengths = struct.unpack_from("<HH", self.view, entry.header_offset + 26)
        start = entry.header_offset + 30 + sum(lengths)
        if entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > len(self.view):
            raise pickle.UnpicklingError(f"{name} is compressed, or ends early")
        return slice(start, start + entry.file_size)

    def find_class(self, module: str, name: str) -> Any:
        known = _STORAGE_DTYPES | _STATE_NAMES
        if (module, name) in known:
            return known[module, name]
        if _is_dtype(module, name):
            return getattr(torch, name)
        raise ForeignNameError(f"{module}.{name} is not part of a tensor")

    def persistent_load(self, place: Any) -> Tensor:
        _, dtype, key, *_ = place
        where = self._place(f"data/{key}")
        count = (where.stop - where.start) // dtype.itemsize
        if not count:  # which torch takes for a mistake
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.view, dtype=dtype, offset=where.start, count=count)


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():  # one number may stand for any many
        raise pickle.UnpicklingError(f"a tensor of {list(size)} has only {storage.numel()} numbers")
    return storage.as_strided(size, stride, offset)


def _tensor_of_dtype(storage: Tensor, offset: int, size: Any, stride: Any, _: Any, __: Any, *rest: Any) -> Tensor:
    return _tensor(storage.view(rest[0]), offset, size, stride)


def _bytes(text: str, encoding: str) -> bytes:
    """Bytes, as torch's old protocol writes them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode(encoding)


_STATE_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "set"): set,
}


class _LegacyReader(_TensorReader):
    """Looks at the names in a file that torch wrote before 1.6."""

    def __init__(self, file: BinaryIO) -> None:
        _Reader.__init__(self, file)

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return (lambda *_: None) if module == "torch._utils" else found

    def persistent_load(self, place: Any) -> Any:
        return None


def _read_legacy(source: Path | io.BytesIO) -> Any:
    with io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else source.open("rb") as file:
        for _ in range(4):  # a mark, the version, sizes of numbers, and what was saved
            _LegacyReader(file).load()
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


class _Module(dict[str, Any]):
    """Stands for any module of a TorchScript archive: its attributes by name."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


class _ModuleReader(_TensorReader):
    """Reads the modules of a TorchScript archive as dicts of tensors.

    OpenAI's CLIP comes as such an archive. torch.jit.load would compile the code in it; here what is not a module, a
    tensor or a plain value is refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch.jit._pickle":  # typed lists and dicts of plain values
            return lambda value, *_: value
        try:
            return super().find_class(module, name)
        except ForeignNameError:
            raise ForeignNameError(f"{module}.{name} is neither a module nor a tensor") from None


def _tensors(module: _Module) -> dict[str, Tensor]:
    """The state dict of a module: names of nested tensors, joined by dots."""
    found: dict[str, Tensor] = {}
    waiting = [("", module)]
    for prefix, owner in waiting:
        for name, value in owner.items():
            if isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
            elif isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
        if len(waiting) > MAX_MODULES or len(prefix) > MAX_NAME:  # few that stand in each other many times
            raise pickle.UnpicklingError(f"it has more than {MAX_MODULES} modules, or longer names than {MAX_NAME}")
    return found
