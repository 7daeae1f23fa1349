"""Output is whole or not there, and nothing is replaced that should not be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_folder import StoredTensor, new_folder, stored_tensors, write_checkpoint


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
