"""Files of weights, read tensor by tensor; nothing in them is ever run."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmcore.pickles import read_modules, read_state

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The tensors of one model."""

    name: str
    """For messages."""
    files: tuple[Path, ...]
    headers: dict[str, Header]
    read: Callable[[str], Tensor]

    def renamed(self, rename: Callable[[str], str | None]) -> "Weights":
        """The same tensors by other names; those that `rename` maps to None are left out.

        Raises:
            ValueError: two tensors would get the same name.
        """
        names: dict[str, str] = {}
        for name in self.headers:
            new = rename(name)
            if new in names:
                raise ValueError(f"{self.name}: {names[new]} and {name} are two names of one tensor")
            if new is not None:
                names[new] = name
        return replace(
            self,
            headers={new: self.headers[name] for new, name in names.items()},
            read=lambda new: self.read(names[new]),
        )


def sha256(path: Path) -> str:
    """Hex digest of a file, of which a few megabytes are in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def open_folder(folder: Path) -> Weights:
    """The weights of a Hugging Face folder: safetensors before pickles, whole or in shards.

    Raises:
        ValueError: no weights, an index that names a file outside the folder or disagrees with its
            files, or files that cannot be read.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            return _open_shards(folder, index)
        if whole.exists():
            return open_file(whole)
    raise ValueError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json and its shards, "
        "or the same as pytorch_model.bin"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raise a ValueError if `path` does not hold a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _open_shards(folder: Path, index: Path) -> Weights:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    shards: dict[str, Weights] = {}
    for place in sorted(set(places.values())):
        # A plain name, judged as text: the hub's cache keeps its files as links to another folder.
        if place in ("", ".", "..") or "/" in place or "\\" in place:
            raise ValueError(f"{index} points to {place!r}: shards must be plain names of files beside the index")
        shards[place] = open_file(folder / place)
    held = {(name, place) for place, shard in shards.items() for name in shard.headers}
    if differing := sorted(name for name, _ in held ^ set(places.items())):
        raise ValueError(f"{index} and its files disagree on where these are: {', '.join(differing)}")
    return Weights(
        name=str(folder),
        files=tuple(shard.files[0] for shard in shards.values()),
        headers={name: shards[place].headers[name] for name, place in places.items()},
        read=lambda name: shards[places[name]].read(name),
    )


def open_file(path: Path) -> Weights:
    """The weights of one file: safetensors, a TorchScript archive, or a pickled state dict.

    A state dict may lie under "state_dict", and its names may begin with "module.", as training scripts
    leave them.

    Raises:
        ValueError: no such file, unreadable, or a pickle of more than tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    content = read_modules(path) if _is_torchscript(path) else read_state(path)
    nested = content.get("state_dict") if isinstance(content, dict) else None
    state = nested if isinstance(nested, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} does not hold a state dict (names to tensors)")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    headers = {name: Header(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    return Weights(name=str(path), files=(path,), headers=headers, read=state.__getitem__)


def _open_safetensors(path: Path) -> Weights:
    def read(name: str) -> Tensor:
        # Opened for each tensor: the file is mapped, and a map that stays keeps all that was read in memory.
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            headers = {
                name: Header(tuple(part.get_shape()), _SAFETENSORS_DTYPES[part.get_dtype()])
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): download it again") from None
    except KeyError as error:
        raise ValueError(f"{path} holds tensors of type {error}, which no map here takes") from None
    return Weights(name=str(path), files=(path,), headers=headers, read=read)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
