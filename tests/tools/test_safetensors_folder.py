"""What is streamed is what the safetensors library reads, cut as huggingface_hub cuts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors_folder import split, total_bytes, write_folder
from torch import Tensor
from weight_map import Parts

State = dict[str, Tensor]


def parts(state: State, read: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Parts]:
    return [
        Parts(shapes={name: tuple(tensor.shape)}, dtype=tensor.dtype, read=lambda t=tensor: (read(t),), origin="")
        for name, tensor in state.items()
    ]


def state() -> State:
    """Odd sizes before wider numbers, a scalar, what is not contiguous."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=random).bfloat16(),
        "a": torch.randn(7, generator=random),
        "half": torch.randn(1, generator=random).half(),
        "double": torch.randn(2, 2, generator=random).double(),
        "scalar": torch.tensor(3.0),
        "turned": torch.randn(4, 6, generator=random).T,
        "\u00e4.weight": torch.randn(50, generator=random),
    }
    return tensors


def written(folder: Path, tensors: list[Parts], max_shard_bytes: int) -> list[str]:
    """Files of weights, after reading them again is the same as never having written them."""
    folder.mkdir()
    shards = split(tensors, max_shard_bytes)
    write_folder(folder, tensors, shards)
    return [shard.name for shard in shards]


def test_one_file(tmp_path: Path) -> None:
    assert written(tmp_path / "out", parts(state()), 10**9) == ["model.safetensors"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in state().items():
        assert found.pop(name).equal(tensor), name
    assert not found
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0


@pytest.mark.parametrize("max_shard_bytes", [200, 230, 300, 390])
def test_shards_are_the_hubs(tmp_path: Path, max_shard_bytes: int) -> None:
    names = written(tmp_path / "out", parts(state()), max_shard_bytes)
    wanted = split_torch_state_dict_into_shards(state(), max_shard_size=max_shard_bytes)
    assert {name: set(load_file(tmp_path / "out" / name)) for name in names} == {
        name: set(tensors) for name, tensors in wanted.filename_to_tensors.items()
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == wanted.tensor_to_filename and len(names) > 1
    assert index["metadata"]["total_size"] == wanted.metadata["total_size"]
    assert index["metadata"]["total_size"] == total_bytes(split(parts(state()), max_shard_bytes))
    whole = {name: tensor for file in names for name, tensor in load_file(tmp_path / "out" / file).items()}
    assert all(whole[name].equal(tensor) for name, tensor in state().items())


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    names = written(tmp_path / "out", parts(state()), 60)
    held = [list(load_file(tmp_path / "out" / name)) for name in names]
    assert held == [["b", "a", "half"], ["double", "scalar"], ["turned"], ["\u00e4.weight"]]


def test_tensors_of_one_read_and_blocks_of_one_tensor(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(4, 3)
    several = Parts(
        shapes={"q": (2, 3), "k": (1, 3)}, dtype=torch.float32, read=lambda: (rows[:2], rows[2:3]), origin=""
    )
    grown = Parts(shapes={"table": (6, 3)}, dtype=torch.float32, read=lambda: (rows, rows[:2]), origin="")
    # Cut between the tensors of one read.
    names = written(tmp_path / "out", [several, grown], 24)
    found = [load_file(tmp_path / "out" / name) for name in names]
    assert [list(file) for file in found] == [["q"], ["k"], ["table"]]
    assert found[0]["q"].equal(rows[:2]) and found[1]["k"].equal(rows[2:3])
    assert found[2]["table"].equal(torch.cat([rows, rows[:2]]))


def test_what_does_not_fill_its_place_is_not_written(tmp_path: Path) -> None:
    rows = torch.ones(4, 3)
    for number, (blocks, message) in enumerate(
        (((rows, rows), "more was read"), ((rows.half(), rows.half()), "float16 in the place of"))
    ):
        wrong = Parts(shapes={"x": (4, 3)}, dtype=torch.float32, read=lambda blocks=blocks: blocks, origin="")
        with pytest.raises(AssertionError, match=message):
            written(tmp_path / str(number), [wrong], 1000)


def test_one_part_is_read_ahead_and_no_more(tmp_path: Path) -> None:
    """What is in memory: the part that is written and the one after it."""
    counted = {"read": 0, "written": 0}
    most = 0

    def read(tensor: Tensor) -> Tensor:
        nonlocal most
        counted["read"] += 1
        most = max(most, counted["read"] - counted["written"])
        return tensor

    def on_bytes(count: int) -> None:
        assert count == 40
        counted["written"] += 1

    tensors = parts({str(number): torch.ones(10) for number in range(20)}, read)
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", tensors, split(tensors, 100), on_bytes)
    assert counted == {"read": 20, "written": 20} and most == 2


def test_an_error_of_reading_is_the_writers(tmp_path: Path) -> None:
    def read(tensor: Tensor) -> Tensor:
        if tensor.numel() == 7:
            raise ValueError("the file ends early")
        return tensor

    with pytest.raises(ValueError, match="the file ends early"):
        written(tmp_path / "out", parts(state(), read), 10**9)
