"""The folders that converters write: a distributed checkpoint of megatron-core with model.json beside it.

Written without megatron-core, a process group or more than a few tensors in memory: torch plans the
whole checkpoint from shapes and asks for each tensor when its turn to be written comes.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mmcore.constants import MODEL_FILE
from mmcore.pickles import read_description, read_tensor

_METADATA_FILE = ".metadata"
# megatron/core/dist_checkpointing/core.py, CheckpointingConfig.
_FORMAT_FILE = "metadata.json"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint that is read or computed when it is wanted."""

    shape: tuple[int, ...]
    """Of one chunk."""
    dtype: torch.dtype
    chunks: tuple[Callable[[], Tensor], ...]
    is_stacked: bool
    """Whether the chunks are layers, on a first axis that `shape` lacks; else the one chunk is all."""
    origins: tuple[str, ...] = ()
    """For the plan: what each chunk is made of."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        return (len(self.chunks), *self.shape) if self.is_stacked else self.shape

    @property
    def num_bytes(self) -> int:
        return len(self.chunks) * torch.Size(self.shape).numel() * self.dtype.itemsize

    def chunk_place(self, chunk: int) -> ChunkStorageMetadata:
        """Where a chunk lies in the whole tensor."""
        first, size = ((chunk,), (1,)) if self.is_stacked else ((), ())
        return ChunkStorageMetadata(
            offsets=torch.Size((*first, *[0] * len(self.shape))), sizes=torch.Size((*size, *self.shape))
        )

    def read(self, chunk: int) -> Tensor:
        tensor = self.chunks[chunk]()
        return tensor.unsqueeze(0) if self.is_stacked else tensor


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Saves a dict of StoredTensor."""

    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.on_bytes = on_bytes

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, tensor in self.state_dict.items():
            for chunk in range(len(tensor.chunks)):
                place = tensor.chunk_place(chunk)
                data = TensorWriteData(place, TensorProperties(dtype=tensor.dtype), torch.Size(tensor.global_shape))
                items.append(WriteItem(MetadataIndex(key, place.offsets, chunk), WriteItemType.SHARD, tensor_data=data))
        # Layer by layer, as the source files are, which are so read from front to back.
        self.plan = SavePlan(sorted(items, key=lambda item: item.index.index or 0))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        tensor = self.state_dict[write_item.index.fqn].read(write_item.index.index)
        self.on_bytes(tensor.nbytes)
        return tensor


def write_checkpoint(
    folder: Path, tensors: dict[str, StoredTensor], on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    """Write the distributed checkpoint into an existing folder.

    Args:
        on_bytes: told the bytes of every tensor as it is written.
    Raises:
        Exception: whatever reading a tensor or writing the file raised.
    """
    # Copying ahead is for tensors on a GPU; where there is one, it would also reorder the reads.
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(tensors, storage_writer=writer, planner=_StreamingPlanner(on_bytes), no_dist=True)
        except CheckpointException as error:  # a BaseException around the one that matters
            raise next(iter(error.failures.values()))[0] from None
    torch.save({}, folder / "common.pt")  # mcore's place for what is not a tensor
    # Last: megatron-core takes no folder for a checkpoint that lacks it.
    (folder / _FORMAT_FILE).write_text(json.dumps(_FORMAT))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what converters write."""
    return (folder / MODEL_FILE).is_file()


@contextmanager
def new_folder(
    output: Path,
    overwrite: bool,
    *inputs: Path,
    what: str = "a checkpoint",
    is_one: Callable[[Path], bool] = is_checkpoint,
) -> Iterator[Path]:
    """A folder to write into that gets the name `output` when all went well, and vanishes when not.

    Args:
        overwrite: whether one that is there already is replaced; anything else never is.
        inputs: what is read meanwhile, and must not be replaced.
        what: is written, for messages.
        is_one: tells it from all else.
    Raises:
        ValueError: `output` is taken.
    """
    output = output.resolve()
    for path in inputs:
        if path.resolve().is_relative_to(output):
            raise ValueError(f"--output {output} would replace the input {path}: choose another folder")
    is_taken = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if is_taken and not is_one(output):
        raise ValueError(f"--output {output} exists and is not {what}: choose another folder, or remove it")
    if is_taken and not overwrite:
        raise ValueError(f"--output {output} holds {what}: choose another folder, or replace it by --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial_output, old = (output.with_name(f".{output.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    partial_output.mkdir()
    try:
        yield partial_output
        if is_taken:
            output.rename(old)
        partial_output.rename(output)
    except BaseException:
        shutil.rmtree(partial_output, ignore_errors=True)
        raise
    if is_taken:
        shutil.rmtree(old)


def stored_tensors(folder: Path, module: str) -> dict[str, StoredTensor]:
    """The tensors of one part (`vision_model`, `language_model`) of a checkpoint, however it is cut.

    Raises:
        ValueError: the folder is no checkpoint, or has no such part.
    """
    if not (folder / _FORMAT_FILE).is_file() or not (folder / _METADATA_FILE).is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: it lacks {_FORMAT_FILE} or {_METADATA_FILE}")
    metadata = read_description(folder)
    found: dict[str, StoredTensor] = {}
    for key, stored in metadata.state_dict_metadata.items():
        if not key.startswith(f"{module}.") or not isinstance(stored, TensorStorageMetadata):
            continue
        stacked = ".layers." in key
        tensor = StoredTensor(
            shape=tuple(stored.size[1:] if stacked else stored.size),
            dtype=stored.properties.dtype,
            chunks=tuple(
                partial(_read, folder, metadata, key, layer if stacked else None)
                for layer in range(stored.size[0] if stacked else 1)
            ),
            is_stacked=stacked,
            origins=tuple(f"{folder.name}" for _ in range(stored.size[0] if stacked else 1)),
        )
        found[key] = tensor
    if not found:
        raise ValueError(f"{folder} holds no tensors of the {module}")
    return found


def _read(folder: Path, metadata: Metadata, key: str, layer: int | None) -> Tensor:
    """A whole tensor, or one layer of a stacked one, from the pieces that the ranks wrote.

    Raises:
        ValueError: pieces are missing or damaged.
    """
    stored: Any = metadata.state_dict_metadata[key]
    size = stored.size if layer is None else torch.Size((1, *stored.size[1:]))
    offsets = torch.Size((layer or 0, *[0] * (len(size) - 1)))
    items = create_read_items_for_chunk_list(key, stored, [ChunkStorageMetadata(offsets, size)])
    if sum(item.lengths.numel() for item in items) != size.numel():
        raise ValueError(f"{folder} is not a complete checkpoint: parts of {key} are in none of its files")
    if len(items) == 1:  # as most are, and need not be copied
        tensor = _read_piece(folder, metadata, items[0])
    else:
        tensor = torch.empty(size, dtype=stored.properties.dtype)
        for item in items:
            narrow_tensor_by_index(tensor, item.dest_offsets, item.lengths).copy_(_read_piece(folder, metadata, item))
    return tensor if layer is None else tensor[0]


def _read_piece(folder: Path, metadata: Metadata, item: ReadItem) -> Tensor:
    # Not by torch's FileSystemReader, which copies every byte twice.
    place: Any = metadata.storage_data[item.storage_index]
    piece = read_tensor(folder / place.relative_path, place.offset, place.length)
    return narrow_tensor_by_index(piece, item.storage_offsets, item.lengths)
