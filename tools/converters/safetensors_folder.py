"""Folders of safetensors, written as their tensors come.

The library's own writer wants a whole file in memory. The format is small: eight bytes with the length
of the header, the header as JSON (names to dtypes, shapes and places), and the tensors' bytes back to
back; numbers are little-endian, and the header is padded with spaces to a multiple of eight bytes.
Source: huggingface/safetensors README, "Format"; names of shards and index as huggingface_hub splits.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from weight_files import Header
from weight_map import Parts

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file and its tensors, in the order of their bytes."""

    name: str
    tensors: dict[str, Header]


def split(parts: Sequence[Parts], max_shard_bytes: int) -> list[Shard]:
    """Deal the tensors out to files, in their order.

    No tensor is split: one that is larger than `max_shard_bytes` gets a file of its own.
    """
    shards: list[dict[str, Header]] = [{}]
    filled = 0
    for part in parts:
        for name, shape in part.shapes.items():
            header = Header(shape, part.dtype)
            if shards[-1] and filled + _num_bytes(header) > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = header
            filled += _num_bytes(header)
    if len(shards) == 1:
        return [Shard(name="model.safetensors", tensors=shards[0])]
    return [
        Shard(name=f"model-{number:05d}-of-{len(shards):05d}.safetensors", tensors=tensors)
        for number, tensors in enumerate(shards, 1)
    ]


def total_bytes(shards: Sequence[Shard]) -> int:
    """Bytes of all tensors."""
    return sum(_num_bytes(header) for shard in shards for header in shard.tensors.values())


def write_folder(
    folder: Path, parts: Sequence[Parts], shards: Sequence[Shard], on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    """Write the shards, and their index where they are several, into an existing folder.

    Args:
        parts: a tensor may come in several blocks, one after the other, which are the rows of it.
        shards: what `split` made of the same parts.
        on_bytes: told the bytes of every block as it is written.
    Raises:
        Exception: whatever reading a tensor or writing a file raised.
    """
    blocks = _read_ahead(parts)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(_header(shard))
            for header in shard.tensors.values():
                _write_tensor(file, header, blocks, on_bytes)
            file.flush()
            os.fsync(file.fileno())
    assert next(blocks, None) is None, "more was read than the shards have room for"
    if len(shards) > 1:
        places = {name: shard.name for shard in shards for name in shard.tensors}
        index = {"metadata": {"total_size": total_bytes(shards)}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _num_bytes(header: Header) -> int:
    return torch.Size(header.shape).numel() * header.dtype.itemsize


def _header(shard: Shard) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, header in shard.tensors.items():
        start, end = end, end + _num_bytes(header)
        content[name] = {"dtype": _DTYPES[header.dtype], "shape": header.shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(
    file: BufferedWriter, header: Header, blocks: Iterator[Tensor], on_bytes: Callable[[int], None]
) -> None:
    missing = _num_bytes(header)
    while missing > 0:
        block = next(blocks)
        assert block.dtype == header.dtype, f"{block.dtype} in the place of {header.dtype}"
        file.write(block.reshape(-1).view(torch.uint8).numpy().data)
        missing -= block.nbytes
        on_bytes(block.nbytes)
    assert missing == 0, "a block reaches beyond its tensor"


def _read_ahead(parts: Sequence[Parts]) -> Iterator[Tensor]:
    """All blocks; while one part's are written, the next part's are read."""
    with ThreadPoolExecutor(1) as reading:
        coming = reading.submit(parts[0].read)
        for following in (*parts[1:], None):
            blocks = coming.result()
            if following:
                coming = reading.submit(following.read)
            yield from blocks
