"""Files of weights: every format gives the same tensors, and none of them runs code."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weight_files import open_file, open_folder, sha256

STATE = {"b.weight": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.float16)}


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def check(path: Path) -> None:
    found = open_folder(path) if path.is_dir() else open_file(path)
    assert set(found.headers) == set(STATE)
    for name, tensor in STATE.items():
        assert found.headers[name].shape == tensor.shape and found.headers[name].dtype == tensor.dtype
        assert torch.equal(found.read(name), tensor)


@pytest.mark.parametrize("content", [STATE, {"state_dict": {f"module.{name}": STATE[name] for name in STATE}}])
@pytest.mark.parametrize("is_zip", [True, False])
def test_state_dicts(tmp_path: Path, content: dict[str, Any], is_zip: bool) -> None:
    if "state_dict" in content:
        content = content | {"epoch": 3}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    check(tmp_path / "w.pt")


def test_safetensors_and_hash(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    check(tmp_path / "model.safetensors")
    check(tmp_path)
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_torchscript_archive(tmp_path: Path) -> None:
    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(STATE["b.weight"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight + torch.ones(3)

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = Inner()
            self.register_buffer("a", STATE["a"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(x)

    torch.jit.trace(Outer(), torch.ones(3)).save(tmp_path / "jit.pt")
    check(tmp_path / "jit.pt")


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"a": Malicious(trace)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"is refused: .*mkdir"):
        open_file(tmp_path / "w.pt")
    # The same inside a TorchScript archive.
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)).save(tmp_path / "good.pt")
    pickled = io.BytesIO()
    torch.save({"a": Malicious(trace)}, pickled)
    evil = zipfile.ZipFile(pickled)
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "jit.pt", "w") as jit:
        for name in good.namelist():
            is_pickle = name.endswith("/data.pkl")
            jit.writestr(name, evil.read("archive/data.pkl") if is_pickle else good.read(name))
    with pytest.raises(ValueError, match="neither a module nor a tensor"):
        open_file(tmp_path / "jit.pt")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", b"not a checkpoint", "is damaged"),
        ("w.safetensors", b"not a checkpoint", "cannot be read as safetensors"),
        ("w.safetensors", b"", "cannot be read as safetensors"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_file(tmp_path / name)


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "w.pt")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        open_file(tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is not a file"):
        open_file(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        open_folder(tmp_path)


def write_shards(folder: Path) -> dict[str, str]:
    places = {"b.weight": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}
    for name, place in places.items():
        save_file({name: STATE[name]}, folder / place)
    return places


def write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path))
    check(tmp_path)
    assert [path.name for path in open_folder(tmp_path).files] == sorted(write_shards(tmp_path).values())


def test_shards_behind_links(tmp_path: Path) -> None:
    """The hub's cache: a folder of links to files named by their hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    places = write_shards(tmp_path / "blobs")
    for place in places.values():
        (tmp_path / "snapshot" / place).symlink_to(tmp_path / "blobs" / place)
    write_index(tmp_path / "snapshot", places)
    check(tmp_path / "snapshot")


@pytest.mark.parametrize("place", ["../model-00001-of-00002.safetensors", "/etc/hostname", "..", "x\\..\\y"])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_shards(tmp_path)
    write_index(folder, write_shards(folder) | {"b.weight": place})
    with pytest.raises(ValueError, match="plain names of files beside the index"):
        open_folder(folder)


def test_an_index_must_agree_with_its_files(tmp_path: Path) -> None:
    places = write_shards(tmp_path)
    write_index(tmp_path, {**places, "a": places["b.weight"]})
    with pytest.raises(ValueError, match=r"disagree on where these are: a"):
        open_folder(tmp_path)
    (tmp_path / places["a"]).unlink()
    write_index(tmp_path, places)
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is not a file"):
        open_folder(tmp_path)
