"""Webdataset shards with the metadata that energon reads, written in one pass.

    OUTPUT/train_000000.tar       samples: KEY.jpg, KEY.json, ...; the same input gives the same bytes
    OUTPUT/train_000000.tar.idx   byte offset of every sample and of the end, uint64 little endian
    OUTPUT/.nv-meta/              .info.json, split.yaml, dataset.yaml
    OUTPUT/SHA256SUMS             of the shards; `sha256sum -c SHA256SUMS` checks them

Format: megatron-energon 7.4.1, `energon prepare` and its CrudeWebdataset; the index files are the same.
"""

import hashlib
import json
import secrets
import shutil
import struct
import tarfile
from pathlib import Path
from types import TracebackType
from typing import IO

import yaml

ENERGON_VERSION = "7.4.1"
META_DIR, INFO_FILE, SPLIT_FILE, DATASET_FILE = ".nv-meta", ".info.json", "split.yaml", "dataset.yaml"
SUMS_FILE = "SHA256SUMS"


class Shard:
    """One tar file in the making; plain ustar, written by hand so that offsets and hash come with it."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.offsets: list[int] = []
        self.sha256 = hashlib.sha256()
        self._offset = 0
        self._index = path.with_name(f"{path.name}.idx")
        self._file: IO[bytes] = path.open("wb")

    def write_sample(self, key: str, parts: dict[str, bytes]) -> None:
        self.offsets.append(self._offset)
        for extension, data in parts.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            self._write(member.tobuf(tarfile.USTAR_FORMAT))
            self._write(data)
            self._write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def close(self) -> None:
        self.offsets.append(self._offset)
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._offset + end) % tarfile.RECORDSIZE))
        self._file.close()
        self._index.write_bytes(struct.pack(f"<{len(self.offsets)}Q", *self.offsets))

    def discard(self) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self._offset += len(data)


class ShardWriter:
    """Writes a dataset whole or not at all.

    Everything goes to a temporary folder beside the output, which takes the output's name when the
    `with` block ends well and disappears when it does not.
    """

    def __init__(self, output: Path, *, samples_per_shard: int = 1000, overwrite: bool = False) -> None:
        """
        Raises:
            ValueError: the output exists and is not to be overwritten, or is no folder.
        """
        if output.exists() and not overwrite:
            raise ValueError(f"{output} exists: name another folder, or replace it with --overwrite")
        if output.exists() and not output.is_dir():
            raise ValueError(f"{output} is a file: name a folder")
        self.output = output.absolute()
        self.folder = self._sibling("incomplete")
        self.samples_per_shard = samples_per_shard
        self.shards: dict[str, list[Shard]] = {}

    def __enter__(self) -> "ShardWriter":
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        open_shards = [shards[-1] for shards in self.shards.values()]
        try:
            if error is None:
                for shard in open_shards:
                    shard.close()
                self._write_metadata()
                self._publish()
        finally:
            for shard in open_shards:
                shard.discard()
            shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, split: str, key: str, parts: dict[str, bytes]) -> None:
        """Append a sample.

        Args:
            split: part of the dataset that it belongs to: train, val.
            key: unique in the dataset, without dots.
            parts: content by file extension.
        """
        assert "." not in key, f"energon ends a key at its first dot: {key}"
        shards = self.shards.setdefault(split, [])
        if not shards or len(shards[-1].offsets) == self.samples_per_shard:
            if shards:
                shards[-1].close()
            shards.append(Shard(self.folder / f"{split}_{len(shards):06d}.tar"))
        shards[-1].write_sample(key, parts)

    def _write_metadata(self) -> None:
        shards = [shard for written in self.shards.values() for shard in written]
        meta = self.folder / META_DIR
        meta.mkdir()
        info = {
            "energon_version": ENERGON_VERSION,
            "shard_counts": {shard.name: len(shard.offsets) - 1 for shard in shards},
        }
        (meta / INFO_FILE).write_text(json.dumps(info, indent=2))
        splits = {split: [_braces(split, len(written))] for split, written in self.shards.items()}
        content = {"split_parts": {"train": [], "val": [], **splits}, "exclude": []}
        (meta / SPLIT_FILE).write_text(yaml.safe_dump(content, sort_keys=False))
        kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
        (meta / DATASET_FILE).write_text(yaml.safe_dump(kind, sort_keys=False))
        sums = "".join(f"{shard.sha256.hexdigest()}  {shard.name}\n" for shard in shards)
        (self.folder / SUMS_FILE).write_text(sums)

    def _publish(self) -> None:
        if not self.output.exists():
            self.folder.rename(self.output)
            return
        replaced = self._sibling("replaced")
        self.output.rename(replaced)
        self.folder.rename(self.output)
        shutil.rmtree(replaced)

    def _sibling(self, state: str) -> Path:
        return self.output.with_name(f".{self.output.name}.{state}-{secrets.token_hex(4)}")


def _braces(split: str, count: int) -> str:
    """Names of all shards of a split: energon expands them as a shell does."""
    return f"{split}_000000.tar" if count == 1 else f"{split}_{{000000..{count - 1:06d}}}.tar"
