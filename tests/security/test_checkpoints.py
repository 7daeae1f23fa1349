"""A stranger's checkpoint, loaded as training and inference load it: each of its files in turn is hostile."""

import functools
import json
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from mmcore import checkpoint, checkpoint_files, distributed
from mmcore.checkpoint_shards import plan_shards
from mmcore.config import ParallelConfig
from mmcore.data.loader import read_states
from mmcore.models.architecture import load_architecture
from tests import ranks, tiny
from tests.security import payloads
from tests.security.sandbox import opened

ALONE = ParallelConfig()
OBJECT = "object"
GADGETS = ("posix.system", "through torch's serialization", "a pickle in a pickle")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: Any) -> Path:
    """A checkpoint of a model, and one of an object that is no tensor."""
    folder = tmp_path_factory.mktemp("honest")
    (folder / "tokenizer").mkdir()

    def save() -> str:
        model = tiny.build(ALONE)
        content = {"model": model, "optimizer": None, "architecture": model.architecture, "state": {}}
        saved = checkpoint.save_checkpoint(
            folder, 1, keep_last=1, tokenizer=folder / "tokenizer", loader_state=b"{}", **content
        )
        (folder / OBJECT).mkdir()
        shards, common = plan_shards({"x": ShardedObject("x", {"plain": 1}, (1,), (0,))}, folder / OBJECT)
        shards.finish(folder / OBJECT, [shards.write()])
        (folder / OBJECT / "common.pt").write_bytes(common)
        return str(saved)

    (saved,) = ranks.run(save, ALONE, 1)
    shutil.move(saved, folder / "model")
    return folder


@pytest.fixture
def folder(tmp_path: Path, honest: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "inside"))


def alone(action: Callable[[], Any]) -> Callable[[], Any]:
    """`action` with megatron-core's groups up."""

    def run() -> Any:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        distributed.initialize(ALONE, seed=1)
        return action()

    return run


def results(steps: dict[str, Callable[[], Any]]) -> Callable[[], str]:
    """All of them, one after the other, as JSON."""

    def run() -> str:
        told = {}
        for name, step in steps.items():
            try:
                told[name] = f"done: {step()}"
            except BaseException as error:  # torch's own, of all ranks, is one
                told[name] = f"{type(error).__name__}: {error}"[-400:]
        return json.dumps(told)

    return run


def load(folder: Path) -> Callable[[], Any]:
    """Load the model of a checkpoint whose manifest says that all is well."""
    checkpoint_files.write_manifest(folder, {})
    return lambda: checkpoint.load_checkpoint(folder, model())


@functools.cache  # of a fork
def model() -> Any:
    return tiny.build(ALONE, seed=9)


def replaced(folder: Path, key: str, content: bytes) -> None:
    """Put other bytes in the place of a tensor or an object of the shards; one that is not there yet is added."""
    description = pickle.loads((folder / ".metadata").read_bytes())
    index = next((index for index in description.storage_data if index.fqn == key), None)
    if index is None:
        index = MetadataIndex(key)
        description.state_dict_metadata[key] = BytesStorageMetadata()
        some = next(iter(description.storage_data.values()))
        description.storage_data[index] = type(some)(some.relative_path, 0, 0)
    place = description.storage_data[index]
    path = folder / place.relative_path
    place.offset, place.length = path.stat().st_size, len(content)
    with path.open("ab") as file:
        file.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(description))


def test_no_file_of_a_checkpoint_runs_code(folder: Path) -> None:
    """Those that are pickles, with gadgets and with what takes memory."""
    hostile = {name: payloads.gadgets(folder.parent / "marker")[name] for name in GADGETS} | payloads.HUNGRY
    key = "language_model.decoder.final_layernorm.weight"
    steps: dict[str, Callable[[], Any]] = {}
    for number, (name, payload) in enumerate(hostile.items()):
        for sink in (".metadata", "common.pt", "a tensor", "an object"):
            place = folder / f"{number}-{sink}"
            shutil.copytree(folder / (OBJECT if sink == "an object" else "model"), place)
            if sink == "an object":
                replaced(place, "x/shard_0_1", payloads.torch_archive(payload))
                steps[f"{name} as {sink}"] = lambda place=place: load_object(place)
                continue
            if sink == "a tensor":
                replaced(place, key, payloads.torch_archive(payload))
            else:
                (place / sink).write_bytes(payload if sink == ".metadata" else payloads.torch_archive(payload))
            steps[f"{name} as {sink}"] = load(place)
        random = folder / f"{number}.pt"
        random.write_bytes(payloads.torch_archive(payload))
        steps[f"{name} as the generators' state"] = lambda random=random: checkpoint._load_random(random)
    told = outcome(folder, steps)
    refused = "is not part of|is damaged|cannot be read|holds weights|is refused|NoneType"  # the last: plain, if odd
    assert not {name: text for name, text in told.items() if text.startswith("done") or not re.search(refused, text)}


def load_object(folder: Path) -> Any:
    wanted = {"x": ShardedObject("x", None, (1,), (0,))}
    return dist_checkpointing.load(wanted, str(folder))["x"]


def outcome(folder: Path, steps: dict[str, Callable[[], Any]]) -> dict[str, str]:
    told = opened(folder, alone(results(steps)))
    assert told.startswith("done: "), told
    found: dict[str, str] = json.loads(told.removeprefix("done: "))
    return found


def test_a_state_that_its_module_would_unpickle_never_reaches_it(folder: Path) -> None:
    """Transformer Engine's modules unpickle what is called `_extra_state`, and load_state_dict hands it to them."""
    name = "language_model.decoder.layers.0.self_attention.linear_qkv"
    payload = torch.frombuffer(bytearray(payloads.gadgets(folder.parent / "marker")["posix.system"]), dtype=torch.uint8)
    shutil.copytree(folder / "model", folder / "common")
    torch.save({"model": {f"{name}._extra_state": payload}}, folder / "common" / "common.pt")
    shutil.copytree(folder / "model", folder / "shards")
    torch.save(payload, folder / "state.pt")
    replaced(folder / "shards", f"{name}._extra_state", (folder / "state.pt").read_bytes())
    checkpoint_files.write_manifest(folder / "shards", {})
    checkpoint_files.write_manifest(folder / "common", {})

    def into_an_engine(place: Path) -> Any:
        module = model().get_submodule(name)
        type(module).set_extra_state = lambda self, state: state is not None and pickle.loads(state.numpy().tobytes())
        if place.name == "control":
            return module.load_state_dict({"_extra_state": payload}, strict=False)
        return checkpoint.load_checkpoint(place, model())

    steps = {place: lambda place=place: into_an_engine(folder / place) for place in ("common", "shards")}
    told = outcome(folder, steps)
    assert "holds weights" in told["common"] and told["shards"].startswith("done: ")
    with pytest.raises(AssertionError, match="marker"):  # it would have
        opened(folder, alone(lambda: into_an_engine(folder / "control")))


def test_plain_files_of_a_checkpoint(folder: Path) -> None:
    """JSON that is nested, huge or of another kind than it should be."""
    deep, good = "[" * 100_000, json.loads((folder / "model" / "model.json").read_text())
    wide = {**good, "language": {**good["language"], "hidden_size": 1 << 20, "num_layers": 1 << 20}}
    steps: dict[str, Callable[[], Any]] = {}
    for name, content in (
        ("deep", deep),
        ("deep in a list", json.dumps({**good, "pictures": 5})[:-1] + f', "x": {"[" * 900}{"]" * 900}}}'),
        ("wide", json.dumps(wide)),
        ("code", json.dumps({**good, "__class__": "os.system"})),
        ("a list", "[]"),
        ("a number for a part", json.dumps({**good, "vision": 5})),
    ):
        place = Path(shutil.copytree(folder / "model", folder / name))
        (place / "model.json").write_text(content)
        steps[name] = lambda place=place: load_architecture(place)
    steps["loader"] = lambda: read_states([deep.encode()])
    steps["loader of infinity"] = lambda: read_states([b'{"position": 1e999, "data_parallel_size": 1, "places": {}}'])
    told = outcome(folder, steps)
    assert all(text.startswith("ValueError: ") for text in told.values()), told
    assert "bytes of the checkpoint's files are too few" in told["wide"]


def test_an_unknown_format_is_not_looked_for(folder: Path) -> None:
    steps: dict[str, Callable[[], Any]] = {}
    formats = json.loads((folder / "model" / "metadata.json").read_text())
    for key in ("sharded_backend", "common_backend"):
        place = Path(shutil.copytree(folder / "model", folder / key))
        (place / "metadata.json").write_text(json.dumps({**formats, key: "posix"}))
        steps[key] = load(place)
    told = outcome(folder, steps)
    assert all("Cannot find a default strategy" in text for text in told.values()), told


def test_honest_ones_load(folder: Path) -> None:
    told = outcome(folder, {"model": load(folder / "model"), "object": lambda: load_object(folder / OBJECT)})
    assert told["model"].startswith("done: {'step': 1") and told["object"] == "done: {'plain': 1}"
