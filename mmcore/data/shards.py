"""Webdataset shards with the metadata that energon reads, written in one pass.

    OUTPUT/train_000000.tar       samples: KEY.jpg, KEY.json, ...; the same input gives the same bytes
    OUTPUT/train_000000.tar.idx   byte offset of every sample and of the end, uint64 little endian
    OUTPUT/.nv-meta/              .info.json, split.yaml, dataset.yaml
    OUTPUT/SHA256SUMS             of the shards; `sha256sum -c SHA256SUMS` checks them

Format: megatron-energon 7.4.1, `energon prepare` and its CrudeWebdataset; the index files are the same.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import yaml

ENERGON_VERSION = "7.4.1"
META_DIR, INFO_FILE, SPLIT_FILE, DATASET_FILE = ".nv-meta", ".info.json", "split.yaml", "dataset.yaml"
SUMS_FILE = "SHA256SUMS"
JOURNAL_FILE, LOCK_FILE = ".journal.json", ".lock"


class FinishedShard(NamedTuple):
    name: str
    num_samples: int
    num_bytes: int
    sha256: str


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

    def finish(self) -> FinishedShard:
        self.offsets.append(self._offset)
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._offset + end) % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._index.write_bytes(struct.pack(f"<{len(self.offsets)}Q", *self.offsets))
        return FinishedShard(self.name, len(self.offsets) - 1, self._offset, self.sha256.hexdigest())

    def discard(self) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self._offset += len(data)


class ShardWriter:
    """Writes a dataset whole or not at all.

    Everything goes to a hidden folder beside the output, `.NAME.incomplete`, which takes the output's
    name when the `with` block ends well. When the job is interrupted, its finished shards stay there up
    to the last `mark`, and a job of the same fingerprint goes on from it.
    """

    def __init__(
        self, output: Path, *, samples_per_shard: int = 1000, overwrite: bool = False, fingerprint: str = ""
    ) -> None:
        """
        Args:
            fingerprint: of all that decides what is written; without one nothing is taken over.
        Raises:
            ValueError: the output exists and is not to be overwritten, or is no folder.
        """
        if output.exists() and not overwrite:
            raise ValueError(f"{output} exists: name another folder, or replace it with --overwrite")
        if output.exists() and not output.is_dir():
            raise ValueError(f"{output} is a file: name a folder")
        self.output = output.absolute()
        self.folder = self.output.with_name(f".{self.output.name}.incomplete")
        self.samples_per_shard = samples_per_shard
        self.fingerprint = f"{fingerprint} {samples_per_shard}" if fingerprint else ""
        self.state: Mapping[str, Any] = {}
        """What an interrupted job gave to `mark` last; empty if there is nothing to go on from."""
        self._finished: dict[str, list[FinishedShard]] = {}
        self._open: dict[str, Shard] = {}

    def __enter__(self) -> "ShardWriter":
        """
        Raises:
            ValueError: another job is writing to the same output.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK_FILE).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"another job is writing {self.output}: wait for it, or name another folder") from None
        self._take_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_interrupted = kind is not None and issubclass(kind, (KeyboardInterrupt, OSError, RuntimeError))
        try:
            if error is None:
                for split in list(self._open):
                    self.end(split)
                self._write_metadata()
                self._publish()
        finally:
            for shard in self._open.values():
                shard.discard()
            if not (is_interrupted and (self.folder / JOURNAL_FILE).exists()):
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()

    def write(self, split: str, key: str, parts: dict[str, bytes]) -> bool:
        """Append a sample.

        Args:
            split: part of the dataset that it belongs to: train, val.
            key: unique in the dataset, without dots.
            parts: content by file extension.
        Returns:
            Whether every shard is finished now, so that `mark` may be called.
        """
        assert "." not in key, f"energon ends a key at its first dot: {key}"
        if split not in self._open:
            number = len(self._finished.setdefault(split, []))
            self._open[split] = Shard(self.folder / f"{split}_{number:06d}.tar")
        shard = self._open[split]
        shard.write_sample(key, parts)
        if len(shard.offsets) == self.samples_per_shard:
            self._finish(split)
        return not self._open

    def mark(self, state: Mapping[str, Any]) -> None:
        """Keep what is finished even if the job is killed from now on.

        Args:
            state: for JSON; the next job finds it as `state`.
        """
        assert not self._open, f"shards that are not finished: {', '.join(self._open)}"
        journal = {"fingerprint": self.fingerprint, "shards": self._finished, "state": state}
        new = self.folder / f"{JOURNAL_FILE}.new"
        with new.open("w") as file:
            json.dump(journal, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / JOURNAL_FILE)

    def end(self, split: str) -> None:
        """Finish the shard of a split that is not full yet: it is the split's last."""
        if split in self._open:
            self._finish(split)

    def _finish(self, split: str) -> None:
        self._finished[split].append(self._open[split].finish())
        del self._open[split]

    def _take_over(self) -> None:
        """Go on from an interrupted job with the same fingerprint; otherwise empty the folder."""
        journal = self._read_journal()
        if journal:
            self.state = journal["state"]
            self._finished = {
                split: [FinishedShard(*shard) for shard in written] for split, written in journal["shards"].items()
            }
        shards = {shard.name for written in self._finished.values() for shard in written}
        for path in self.folder.iterdir():
            is_of_the_job = path.suffix not in (".tar", ".idx") or path.name.removesuffix(".idx") in shards
            if path.name != LOCK_FILE and not (journal and is_of_the_job):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            journal = json.loads((self.folder / JOURNAL_FILE).read_text())
        except FileNotFoundError:
            return None
        if not self.fingerprint or journal["fingerprint"] != self.fingerprint:
            return None
        shards = [FinishedShard(*shard) for written in journal["shards"].values() for shard in written]
        for name, num_samples, num_bytes, _ in shards:
            for path, size in ((self.folder / name, num_bytes), (self.folder / f"{name}.idx", 8 * num_samples + 8)):
                if not path.exists() or path.stat().st_size != size:
                    return None
        return journal

    def _write_metadata(self) -> None:
        shards = [shard for written in self._finished.values() for shard in written]
        meta = self.folder / META_DIR
        meta.mkdir(exist_ok=True)
        info = {
            "energon_version": ENERGON_VERSION,
            "shard_counts": {shard.name: shard.num_samples for shard in shards},
        }
        (meta / INFO_FILE).write_text(json.dumps(info, indent=2))
        splits = {split: [_braces(split, len(written))] for split, written in self._finished.items()}
        content = {"split_parts": {"train": [], "val": [], **splits}, "exclude": []}
        (meta / SPLIT_FILE).write_text(yaml.safe_dump(content, sort_keys=False))
        kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
        (meta / DATASET_FILE).write_text(yaml.safe_dump(kind, sort_keys=False))
        sums = "".join(f"{shard.sha256}  {shard.name}\n" for shard in shards)
        (self.folder / SUMS_FILE).write_text(sums)

    def _publish(self) -> None:
        for name in (JOURNAL_FILE, LOCK_FILE):
            (self.folder / name).unlink(missing_ok=True)
        if not self.output.exists():
            self.folder.rename(self.output)
            return
        replaced = self.output.with_name(f".{self.output.name}.replaced-{secrets.token_hex(4)}")
        self.output.rename(replaced)
        self.folder.rename(self.output)
        shutil.rmtree(replaced)


def _braces(split: str, count: int) -> str:
    """Names of all shards of a split: energon expands them as a shell does."""
    return f"{split}_000000.tar" if count == 1 else f"{split}_{{000000..{count - 1:06d}}}.tar"
