"""Datasets as energon finds them: opened, checked, told apart, and read sample by sample.

energon knows the formats: a dataset's metadata, metadatasets that blend several, paths of object
stores. Samples are read by their place in a shard's index, without energon's own readers, which take
four times as long for a sample and tie a place in the data to the number of ranks.
"""

import bisect
import functools
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from megatron.energon import WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset

from mmcore.data.energon import load_dataset
from mmcore.data.shards import INFO_FILE, META_DIR, SUMS_FILE
from mmcore.data.workers import reading

# Shards of a source that a process keeps open.
OPEN_SHARDS = 64

# What is believed of a dataset that a stranger made.
MAX_SAMPLE_BYTES = 1 << 28
MAX_SHARD_SAMPLES = 1 << 24
MAX_REPETITIONS = 10_000


class RawSample(NamedTuple):
    """A sample as its shard holds it."""

    source: int
    """Which of the dataset's sources it is from."""
    shard: str
    key: str
    parts: dict[str, bytes]
    """Content by file extension."""


class Shard:
    """One open tar file, read at the offsets of its index."""

    _descriptor: int | None = None
    _file: Any = None

    def __init__(self, path: EPath) -> None:
        self.offsets = np.frombuffer(EPath(f"{path}.idx").read_bytes(), "<u8")
        if path.is_local():
            self._descriptor = os.open(path.local_path(), os.O_RDONLY | os.O_CLOEXEC)
        else:
            self._file = path.open("rb")

    def read(self, index: int) -> bytes:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        if not 0 <= end - start <= MAX_SAMPLE_BYTES:
            raise ValueError(f"it would have {end - start} bytes, and at most {MAX_SAMPLE_BYTES} are read")
        if self._descriptor is not None:
            data = os.pread(self._descriptor, end - start, start)  # moves no position that forks would share
        else:
            self._file.seek(start)
            data = self._file.read(end - start)
        if len(data) < end - start:
            raise ValueError("the file ends early")
        return data

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._file is not None:
            self._file.close()


@dataclass(eq=False)
class Source:
    """One dataset among those that are blended."""

    number: int
    name: str
    """Of its folder; tells it apart from the others in logs."""
    path: EPath
    shards: tuple[tuple[EPath, int], ...]
    """Path and number of samples of each."""
    begin: int
    end: int
    """Which of the shards' samples belong to it."""
    excluded: frozenset[str]
    """Samples that its metadata leaves out, as `shard/key`."""
    weight: float | None
    """Share of the draws, in a blend by weight."""
    repetitions: float | None
    """Times that an epoch holds it, in a blend by epochs."""
    _ends: list[int] = field(init=False, repr=False)
    _open: Callable[[int], Shard] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._ends = list(itertools.accumulate(count for _, count in self.shards))
        self._open = functools.lru_cache(OPEN_SHARDS)(lambda place: Shard(self.shards[place][0]))

    def __len__(self) -> int:
        return self.end - self.begin

    def read(self, index: int) -> RawSample | None:
        """Sample `index`, from 0 to len - 1; None if the metadata leaves it out.

        Raises:
            ValueError: its shard is missing or damaged; names the shard.
        """
        number = self.begin + index
        place = bisect.bisect_right(self._ends, number)
        path, count = self.shards[place]
        within = number - (self._ends[place] - count)
        reading(f"sample {within} of {path}")
        try:
            key, parts = members(self._open(place).read(within))
        except (IndexError, OSError, RecursionError, ValueError, tarfile.TarError) as error:
            raise ValueError(f"sample {within} of {path} cannot be read ({error})") from None
        if f"{path.name}/{key}" in self.excluded:
            return None
        return RawSample(self.number, path.name, key, parts)


@dataclass(frozen=True)
class Dataset:
    """What `--data.path` stands for: one source, or several blended."""

    sources: tuple[Source, ...]
    by_weight: bool
    """Whether sources are drawn by weight, without end; otherwise an epoch holds each so many times."""
    digest: str
    """Identity of the samples and their order."""


def members(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and parts of a sample, from the stretch of a tar file that holds it.

    Raises:
        ValueError, tarfile.TarError: not such a stretch, or a member is a link, a device, sparse, or leads out of its
            folder by its name.
    """
    key, offset = "", 0
    parts: dict[str, bytes] = {}
    while offset < len(data):
        header = tarfile.TarInfo.frombuf(data[offset : offset + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):  # names beyond ustar, folders
            return _members(data)
        offset += tarfile.BLOCKSIZE
        key = _add(parts, key, header.name, _content(data, offset, header))
        offset += -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return _whole(key, parts)


def _members(data: bytes) -> tuple[str, dict[str, bytes]]:
    """The same by tarfile, which knows every header there is and takes longer."""
    key: str = ""
    parts: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            content = _content(data, member.offset_data, member)
            if not member.isdir():
                key = _add(parts, key, member.name, content)
    return _whole(key, parts)


def _content(data: bytes, offset: int, member: tarfile.TarInfo) -> bytes:
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError(f"{member.name} is a link, a device or sparse, and no plain file")
    if not 0 <= member.size <= len(data) - offset:  # a size below zero would lead back, for ever
        raise ValueError(f"{member.name} would have {member.size} bytes, more than are there")
    return data[offset : offset + member.size]


def _add(parts: dict[str, bytes], key: str, name: str, content: bytes) -> str:
    """Add a file to a sample, if it belongs to one; the sample's key."""
    found = split_name_re.match(name)
    if not found or skip_meta_re.match(name):
        return key
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{name} leads out of its folder")
    if key and found[1] != key:
        raise ValueError(f"its index is not that of the file: {name} stands in the sample {key}")
    parts[found[2]] = content
    return str(found[1])


def _whole(key: str, parts: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
    if not parts:
        raise ValueError("it holds no file")
    return key, parts


def open_dataset(path: str, split: str = "train") -> Dataset:
    """A split of an energon dataset, or of a metadataset that blends several.

    Args:
        path: folder or YAML file; `msc://PROFILE/...` in an object store.
    Raises:
        ValueError: it is not there, is neither, has no such split, lacks a shard, or asks for what is not
            known here (joins, auxiliary files, JSON Lines).
    """
    is_local = "://" not in path
    if not is_local and not path.startswith("msc://"):
        raise ValueError(f"the dataset {path}: object stores are read as msc://PROFILE/PATH, see docs/data.md")
    if is_local and not Path(path).exists():
        raise ValueError(f"the dataset {path} does not exist: write it with `mmcore prepare`")
    if is_local and Path(path).is_dir() and not (Path(path) / META_DIR / INFO_FILE).is_file():
        raise ValueError(
            f"the dataset {path} is no energon dataset ({META_DIR}/{INFO_FILE} is missing): write one with "
            "`mmcore prepare`"
        )
    try:
        found = load_dataset(EPath(path)).get_datasets(
            training=True,
            split_part=split,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            shuffle_over_epochs_multiplier=1,
        )
    except EmptyDatasetError:
        raise ValueError(f"the dataset {path} has no samples in its split {split!r}: prepare it again") from None
    except Exception as error:  # of YAML, JSON and what they mean: energon raises whatever it stumbles over
        if isinstance(error, KeyError) and error.args == (split,):
            raise ValueError(
                f"the blend {path} has no split {split!r}: name its datasets there, as for train"
            ) from None
        raise ValueError(f"the dataset {path} is no readable energon dataset ({error!r}): prepare it again") from None
    names = Counter(part.dataset.path.name for part in found.datasets if hasattr(part.dataset, "shards"))
    sources = tuple(_source(number, part, path, names) for number, part in enumerate(found.datasets))
    by_weight = found.blend_mode is DatasetBlendMode.DATASET_WEIGHT
    return Dataset(sources=sources, by_weight=by_weight, digest=_digest(sources))


def _source(number: int, part: LoadedDataset, path: str, names: Counter[str]) -> Source:
    dataset = part.dataset
    if part.aux or not hasattr(dataset, "shards"):
        raise ValueError(
            f"the dataset {path} asks for a join, for auxiliary files or for JSON Lines, which mmcore does not read: "
            "name webdatasets, and prepare what they need into their samples"
        )
    if part.repetitions is not None and not 0 <= part.repetitions <= MAX_REPETITIONS:
        raise ValueError(f"the dataset {path} repeats {dataset.path.name} {part.repetitions} times in an epoch")
    for shard in dataset.shards:
        if shard.name.startswith("/") or ".." in shard.name.split("/"):
            raise ValueError(f"the dataset {path} names the shard {shard.name}, which leads out of its folder")
        if shard.path.is_local():
            _check_shard(shard.path.local_path(), shard.count)
    begin, end = dataset.subset.compute_subset(len(dataset)) if dataset.subset else (0, len(dataset))
    name = dataset.path.name
    return Source(
        number=number,
        name=name if names[name] == 1 else f"{name}_{number}",
        path=dataset.path,
        shards=tuple((shard.path, shard.count) for shard in dataset.shards),
        begin=begin,
        end=end,
        excluded=frozenset(dataset.sample_excludes),
        weight=part.weight,
        repetitions=part.repetitions,
    )


def _check_shard(path: Path, count: int) -> None:
    index = path.with_name(f"{path.name}.idx")
    for file in (path, index):
        if not file.is_file():
            raise ValueError(f"{file} is missing from the dataset: copy it again, or prepare the dataset again")
    if not 0 <= count <= MAX_SHARD_SAMPLES or index.stat().st_size != 8 * (count + 1):
        raise ValueError(f"{index} is not the index of {count} samples: copy it again, or prepare the dataset again")


def _digest(sources: Sequence[Source]) -> str:
    """Hash of all that decides which samples there are; reads no shard."""
    digest = hashlib.sha256()
    for source in sources:
        shape: list[Any] = [source.begin, source.end, source.weight, source.repetitions, sorted(source.excluded)]
        shape.append([(path.name, count) for path, count in source.shards])
        digest.update(json.dumps(shape).encode())
        sums = source.path / SUMS_FILE
        if sums.is_file():
            digest.update(sums.read_bytes())
        else:  # not one of ours: the samples' sizes
            for path, _ in source.shards:
                digest.update(EPath(f"{path}.idx").read_bytes())
    return digest.hexdigest()
