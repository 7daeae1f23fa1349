"""Output is whole or not there, and nothing is replaced that should not be."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_folder import StoredTensor, new_folder, stored_tensors, write_checkpoint
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mmcore.pickles import read_tensor


def tensors() -> dict[str, StoredTensor]:
    layers = tuple((lambda value=value: torch.full((2, 3), value)) for value in (1.0, 2.0, 3.0))
    return {
        "vision_model.decoder.layers.x": StoredTensor(
            shape=(2, 3), dtype=torch.float32, chunks=layers, is_stacked=True
        ),
        "language_model.y": StoredTensor(
            shape=(4,), dtype=torch.float16, chunks=(lambda: torch.ones(4, dtype=torch.float16),), is_stacked=False
        ),
    }


def test_written_tensors_read_back(tmp_path: Path, read_checkpoint: Callable[[Path], dict[str, torch.Tensor]]) -> None:
    write_checkpoint(tmp_path, tensors())
    state = read_checkpoint(tmp_path)
    assert state["vision_model.decoder.layers.x"][:, 1, 2].tolist() == [1, 2, 3]
    assert torch.equal(state["language_model.y"], torch.ones(4, dtype=torch.float16))
    assert {path.name for path in tmp_path.iterdir()} == {".metadata", "__0_0.distcp", "common.pt", "metadata.json"}


def test_layer_by_layer_whatever_the_chunks(tmp_path: Path) -> None:
    # As a training run leaves it: one chunk over all layers, optimizer state beside the weights.
    whole = torch.arange(12.0).view(3, 2, 2)
    state = {"vision_model.decoder.layers.x": whole, "optimizer.vision_model.z": torch.ones(2)}
    write_checkpoint(
        tmp_path,
        {
            key: StoredTensor(
                shape=tuple(tensor.shape), dtype=tensor.dtype, chunks=(lambda tensor=tensor: tensor,), is_stacked=False
            )
            for key, tensor in state.items()
        },
    )
    found = stored_tensors(tmp_path, "vision_model")
    assert list(found) == ["vision_model.decoder.layers.x"]
    stacked = found["vision_model.decoder.layers.x"]
    assert stacked.global_shape == (3, 2, 2)
    assert torch.equal(torch.cat([stacked.read(layer) for layer in range(3)]), whole)
    with pytest.raises(ValueError, match="holds no tensors of the language_model"):
        stored_tensors(tmp_path, "language_model")
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        stored_tensors(tmp_path, "vision_model")


def test_pieces_of_ranks_are_put_together(tmp_path: Path) -> None:
    """As tensor parallel ranks leave them: cut across the rows, across the columns, or both."""
    whole = torch.arange(24.0).view(2, 3, 4)
    places = [((layer, 0, column), (1, 3, 2)) for layer in range(2) for column in (0, 2)]
    ranks_write(tmp_path, "vision_model.decoder.layers.x", whole, places)
    found = stored_tensors(tmp_path, "vision_model")["vision_model.decoder.layers.x"]
    assert torch.equal(torch.cat([found.read(layer) for layer in range(2)]), whole)


def test_a_missing_piece_is_an_error(tmp_path: Path) -> None:
    ranks_write(tmp_path, "vision_model.x", torch.ones(4, 4), [((0, 0), (2, 4)), ((2, 0), (1, 4))])
    with pytest.raises(
        ValueError, match=r"not a complete checkpoint: parts of vision_model\.x are in none of its files"
    ):
        stored_tensors(tmp_path, "vision_model")["vision_model.x"].read(0)


def ranks_write(folder: Path, key: str, whole: torch.Tensor, places: list[tuple[tuple[int, ...], ...]]) -> None:
    """A checkpoint of one tensor in pieces, each with its offsets and sizes."""
    names = [f"{key}.{number}" for number in range(len(places))]
    pieces = [
        whole[tuple(slice(start, start + size) for start, size in zip(*place, strict=True))].clone() for place in places
    ]
    write_checkpoint(
        folder,
        {
            name: StoredTensor(
                shape=tuple(piece.shape), dtype=piece.dtype, chunks=(lambda piece=piece: piece,), is_stacked=False
            )
            for name, piece in zip(names, pieces, strict=True)
        },
    )
    path = folder / ".metadata"
    metadata: Any = dcp.FileSystemReader(folder).read_metadata()
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in places]
    metadata.storage_data = {
        MetadataIndex(key, chunk.offsets): metadata.storage_data[MetadataIndex(name, torch.Size([0] * whole.ndim))]
        for name, chunk in zip(names, chunks, strict=True)
    }
    metadata.state_dict_metadata = {
        key: TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.shape, chunks)
    }
    path.write_bytes(pickle.dumps(metadata))


def call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls what `name` is in `module`."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    # A name with a dot reaches through a module of which some names are allowed.
    [("posix", "system"), ("torch.serialization", "os.system"), ("torch", "serialization.os.system")],
)
def test_the_description_runs_no_code(tmp_path: Path, module: str, name: str) -> None:
    write_checkpoint(tmp_path, tensors())
    (tmp_path / ".metadata").write_bytes(call(module, name, f"touch {tmp_path}/executed"))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read .*is not part of a checkpoint's description"):
        stored_tensors(tmp_path, "vision_model")
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert (tmp_path / "executed").exists()


def test_tensors_of_all_kinds_read_back(tmp_path: Path) -> None:
    """Turned ones are stored as they lie in memory, and bytes before others leave those at odd places."""
    state = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "turned": torch.randn(3, 5).T,
        "double": torch.randn(2, 2, dtype=torch.float64),
        "half": torch.randn(4).bfloat16(),
    }
    write_checkpoint(
        tmp_path,
        {
            f"vision_model.{name}": StoredTensor(
                shape=tuple(tensor.shape), dtype=tensor.dtype, chunks=(lambda t=tensor: t,), is_stacked=False
            )
            for name, tensor in state.items()
        },
    )
    found = stored_tensors(tmp_path, "vision_model")
    for name, tensor in state.items():
        read = found[f"vision_model.{name}"].read(0)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


def test_a_tensor_runs_no_code(tmp_path: Path) -> None:
    """What is in a piece is a pickle too."""
    command = call("posix", "system", f"touch {tmp_path}/executed")
    with zipfile.ZipFile(tmp_path / "piece", "w") as archive:
        archive.writestr("archive/data.pkl", command)
    with pytest.raises(ValueError, match=r"piece is damaged: .*posix\.system is not part of a tensor"):
        read_tensor(tmp_path / "piece", 0, (tmp_path / "piece").stat().st_size)
    assert not (tmp_path / "executed").exists()


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise ValueError("the file ends early")

    broken = tensors()
    broken["z"] = StoredTensor(shape=(1,), dtype=torch.float32, chunks=(fail,), is_stacked=False)
    with pytest.raises(ValueError, match="the file ends early"), new_folder(tmp_path / "out", False) as folder:
        write_checkpoint(folder, broken)
    assert list(tmp_path.iterdir()) == []


def checkpoint(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "model.json").write_text(content)
    return folder


def test_a_checkpoint_is_replaced_only_when_asked(tmp_path: Path) -> None:
    output = checkpoint(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="--overwrite"), new_folder(output, False):
        pass
    with pytest.raises(RuntimeError), new_folder(output, True):
        raise RuntimeError
    assert (output / "model.json").read_text() == "old"
    with new_folder(output, True) as folder:
        (folder / "model.json").write_text("new")
    assert (output / "model.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [output]


def test_nothing_else_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for taken in ("home", "file"):
        with pytest.raises(ValueError, match="is not a checkpoint"), new_folder(tmp_path / taken, True):
            pass
    inside = checkpoint(tmp_path / "in", "input")
    with pytest.raises(ValueError, match="would replace the input"), new_folder(inside, True, inside / "weights.pt"):
        pass
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", False):
        pass
    with new_folder(tmp_path / "new" / "deep", False):
        pass
    assert (tmp_path / "new" / "deep").is_dir()


def test_what_counts_as_an_output_of_its_kind(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export").write_text("old")
    kind: dict[str, Any] = {"what": "an export", "is_one": lambda folder: (folder / "export").exists()}
    with pytest.raises(ValueError, match="is not a checkpoint"), new_folder(tmp_path / "out", True):
        pass
    with (
        pytest.raises(ValueError, match=r"holds an export: .*--overwrite"),
        new_folder(tmp_path / "out", False, **kind),
    ):
        pass
    with new_folder(tmp_path / "out", True, **kind):
        pass
    assert list((tmp_path / "out").iterdir()) == []
    other = checkpoint(tmp_path / "other", "a checkpoint")
    with pytest.raises(ValueError, match="is not an export"), new_folder(other, True, **kind):
        pass
