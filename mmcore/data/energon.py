"""energon, kept from running what a dataset names.

Its YAML may name any class or function of any module with arguments for it, and Python files beside the data: reading
such a dataset would run them. Here a name is looked up among energon's own kinds of datasets, and no file is run:
mmcore reads samples itself. Nor may a pattern of a few characters stand for more shards than anyone has.

Source: megatron-energon 7.4.1, typed_converter.py, module_loader.py; flavors/webdataset/metadata.py.
"""

import itertools
import math
import os
import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import braceexpand
import megatron.energon as energon
import webdataset.utils
from megatron.energon.flavors.webdataset import metadata
from megatron.energon.metadataset import load_dataset
from megatron.energon.module_loader import ModuleLoader
from megatron.energon.typed_converter import JsonParser

__all__ = ["expand", "load_dataset"]

KINDS = (energon.BaseCoreDatasetFactory, energon.DatasetLoaderInterface, energon.Sample)
MAX_SHARDS = 1 << 20


def _find(self: Any, module: str, name: str, *_: Any) -> Any:
    found = getattr(energon, str(name), None) if str(module).split(".")[:2] == ["megatron", "energon"] else None
    if isinstance(found, type) and issubclass(found, KINDS):
        return found
    raise ValueError(f"it names {module}.{name}, which is no dataset of energon's and would be run: take it out")


def _refuse(self: Any, path: Any) -> None:
    raise ValueError(f"it names the program {path}, which would be run: take it out, mmcore reads samples itself")


def expand(pattern: str) -> Iterable[str]:
    """Names that a pattern such as `train_{000000..000009}.tar` stands for.

    Raises:
        ValueError: they are too many, or braces stand in braces.
    """
    if re.search(r"\{[^}]*\{", pattern):
        raise ValueError(f"{pattern!r:.80} has braces in braces")
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges)
    names = list(itertools.islice(braceexpand.braceexpand(pattern), MAX_SHARDS + 1)) if count <= MAX_SHARDS else []
    if count > MAX_SHARDS or len(names) > MAX_SHARDS:
        raise ValueError(f"{pattern!r:.80} stands for more than {MAX_SHARDS} names")
    return names


# webdataset, which energon brings, then unpickles nothing and starts no program; processes that are started ask for it.
os.environ["WDS_SECURE"], webdataset.utils.enforce_security = "1", True

JsonParser._resolve_object = _find
ModuleLoader._load_module = _refuse
metadata.braceexpand = SimpleNamespace(braceexpand=expand)
