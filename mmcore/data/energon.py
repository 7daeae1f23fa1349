"""energon, kept from running what a dataset names.

Its YAML may name any class or function of any module with arguments for it, and Python files beside the data: reading
such a dataset would run them. Here a name is looked up among energon's own kinds of datasets, and no file is run:
mmcore reads samples itself. Nor may a pattern of a few characters stand for more shards than anyone has.

Source: megatron-energon 7.4.1, typed_converter.py, module_loader.py; flavors/webdataset/metadata.py.
"""

import os
from types import SimpleNamespace
from typing import Any

import megatron.energon as energon
import webdataset.utils
from megatron.energon.flavors.webdataset import metadata
from megatron.energon.metadataset import load_dataset
from megatron.energon.module_loader import ModuleLoader
from megatron.energon.typed_converter import JsonParser

from mmcore.foreign import expand

__all__ = ["load_dataset"]

KINDS = (energon.BaseCoreDatasetFactory, energon.DatasetLoaderInterface, energon.Sample)


def _find(self: Any, module: str, name: str, *_: Any) -> Any:
    found = getattr(energon, str(name), None) if str(module).split(".")[:2] == ["megatron", "energon"] else None
    if isinstance(found, type) and issubclass(found, KINDS):
        return found
    raise ValueError(f"it names {module}.{name}, which is no dataset of energon's and would be run: take it out")


def _refuse(self: Any, path: Any) -> None:
    raise ValueError(f"it names the program {path}, which would be run: take it out, mmcore reads samples itself")


# webdataset, which energon brings, then unpickles nothing and starts no program; processes that are started ask for it.
os.environ["WDS_SECURE"], webdataset.utils.enforce_security = "1", True

JsonParser._resolve_object = _find
ModuleLoader._load_module = _refuse
metadata.braceexpand = SimpleNamespace(braceexpand=expand)
