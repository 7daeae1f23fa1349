"""energon's loader state as JSON and back.

It holds classes of energon's own, some of them subclasses of dict, which `torch.load` refuses without
the licence to run code. Here no class but those named below is ever made.
"""

import base64
from dataclasses import fields
from typing import Any

from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

DATACLASSES = {
    kind.__name__: kind for kind in (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SliceState)
}


def to_json(value: Any) -> Any:
    """Values that JSON has stay; all others become [kind, content].

    Raises:
        TypeError: a class that is not known here.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return [kind.__name__, [to_json(item) for item in value]]
    if kind is bytes:
        return ["bytes", base64.b85encode(value).decode()]
    if kind is FlexState:
        return ["FlexState", {key: to_json(item) for key, item in value.items()}]
    if kind in DATACLASSES.values():
        return [kind.__name__, {field.name: to_json(getattr(value, field.name)) for field in fields(value)}]
    raise TypeError(f"a loader's state holds a {kind.__module__}.{kind.__qualname__}, which is not known how to save")


def from_json(value: Any) -> Any:
    """What `to_json` was given.

    Raises:
        ValueError, TypeError, KeyError: not made by `to_json`.
    """
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "list":
        return [from_json(item) for item in content]
    if kind == "tuple":
        return tuple(from_json(item) for item in content)
    if kind == "bytes":
        return base64.b85decode(content)
    items = {key: from_json(item) for key, item in content.items()}
    return FlexState(items) if kind == "FlexState" else DATACLASSES[kind](**items)
