"""Datasets as energon finds them on disk: opened, checked, and told apart."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron.energon import WorkerConfig
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.metadataset import load_dataset
from megatron.energon.metadataset.loader_interface import LoadedDatasetList

from mmcore.data.shards import INFO_FILE, META_DIR, SUMS_FILE

# Samples that are read one after the other before another place of the shards is chosen.
MAX_SAMPLES_PER_SEQUENCE = 100


def open_dataset(path: Path, workers: WorkerConfig) -> LoadedDatasetList:
    """The train split of an energon dataset or metadataset.

    Raises:
        ValueError: it is not there, is neither, has no train split, or lacks a shard.
    """
    if not path.exists():
        raise ValueError(f"--data.path {path} does not exist: write it with `mmcore prepare`")
    if path.is_dir() and not (path / META_DIR / INFO_FILE).is_file():
        raise ValueError(
            f"--data.path {path} is no energon dataset ({META_DIR}/{INFO_FILE} is missing): write one with "
            "`mmcore prepare`"
        )
    try:
        found = load_dataset(path).get_datasets(
            training=True,
            split_part="train",
            worker_config=workers,
            max_samples_per_sequence=MAX_SAMPLES_PER_SEQUENCE,
            shuffle_over_epochs_multiplier=1,
            decoder=None,
        )
    except (AssertionError, EmptyDatasetError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"--data.path {path} is no readable energon dataset ({error!r}): prepare it again") from None
    for shard in (shard for part in found.datasets for shard in part.dataset.shards):
        for file in (Path(str(shard.path)), Path(f"{shard.path}.idx")):
            if not file.is_file():
                raise ValueError(f"{file} is missing from the dataset: copy it again, or prepare the dataset again")
    return found


def hash_dataset(found: LoadedDatasetList) -> str:
    """Identity of the samples and their order; reads no shard."""
    digest = hashlib.sha256()
    for part in found.datasets:
        folder = Path(str(part.dataset.path))
        shape = [part.weight, part.repetitions, _without_paths(part.dataset.config())]
        digest.update(json.dumps(shape, sort_keys=True).encode())
        if (folder / SUMS_FILE).is_file():
            digest.update((folder / SUMS_FILE).read_bytes())
        else:  # not one of ours: the samples' sizes
            for shard in part.dataset.shards:
                digest.update(Path(f"{shard.path}.idx").read_bytes())
    return digest.hexdigest()


def _without_paths(config: Any) -> Any:
    """energon's description of a dataset but for what may change: it marks that by an underscore."""
    if isinstance(config, dict):
        return {key: _without_paths(value) for key, value in config.items() if not key.startswith("_")}
    return [_without_paths(value) for value in config] if isinstance(config, (list, tuple)) else config
