"""What torch pickles into a distributed checkpoint, read without running what a pickle names.

Source: torch distributed/checkpoint/filesystem.py, _write_item; serialization.py, _save.
"""

import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from weight_files import STORAGE_DTYPES

# All that is in .metadata. A name with dots would reach into the module, so these are whole names.
_METADATA_NAMES = {
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.serialization": ("_get_layout",),
}


def read_metadata(path: Path) -> Metadata:
    """Read a checkpoint's .metadata.

    Raises:
        ValueError: it is damaged, or names something else than torch's writer does.
    """
    try:
        with path.open("rb") as file:
            return _MetadataReader(file).load()
    except Exception as error:  # a damaged pickle can raise any
        raise ValueError(f"{path} cannot be read as the description of a checkpoint ({error})") from None


def read_tensor(path: Path, offset: int, length: int) -> Tensor:
    """A tensor that torch.save left in a part of a file: a view of the file, which is not copied.

    Raises:
        ValueError: it is damaged, or holds something else than a tensor.
    """
    try:
        with path.open("rb") as file:
            return _TensorReader(file, offset, length).load()
    except Exception as error:  # a damaged pickle can raise any
        raise ValueError(f"{path} is damaged: no tensor at byte {offset} ({error})") from None


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's description")


class _View(mmap.mmap):
    """A part of a file, as zipfile takes it."""

    def seekable(self) -> bool:
        return True


class _TensorReader(pickle.Unpickler):
    """Reads the zip archive that torch.save writes, in which tensors are stored as they are."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        before = offset % mmap.ALLOCATIONGRANULARITY  # which zipfile passes over
        # Copied where it is written to, which nobody does: torch takes no view that is only for reading.
        view: Any = _View(file.fileno(), before + length, offset=offset - before, access=mmap.ACCESS_COPY)
        self.view = view
        self.view.madvise(mmap.MADV_WILLNEED)  # else it comes from the disk page by page, as it is looked at
        self.archive = zipfile.ZipFile(view)
        self.root = self.archive.namelist()[0].split("/")[0]
        super().__init__(self.archive.open(f"{self.root}/data.pkl"))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a tensor")

    def persistent_load(self, place: Any) -> Tensor:
        _, dtype, key, *_ = place
        entry = self.archive.getinfo(f"{self.root}/data/{key}")
        # Its bytes follow a header of 30, at whose end stand the lengths of a name and of padding, and these.
        name, padding = struct.unpack_from("<HH", self.view, entry.header_offset + 26)
        start = entry.header_offset + 30 + name + padding
        return torch.frombuffer(self.view, dtype=dtype, offset=start, count=entry.file_size // dtype.itemsize)
