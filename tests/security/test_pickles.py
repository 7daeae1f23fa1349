"""Files that are pickles, or hold some: none runs what it names, none takes more memory than it is large."""

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import weight_files
from checkpoint_folder import StoredTensor, stored_tensors, write_checkpoint

from mmcore import pickles
from tests.security import payloads
from tests.security.sandbox import opened

WEIGHT = torch.arange(6.0).view(2, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


def checkpoint(folder: Path) -> Path:
    """A folder as converters write it, of one tensor."""
    chunks = (lambda: WEIGHT,)
    tensor = StoredTensor(shape=(2, 3), dtype=torch.float32, chunks=chunks, is_stacked=False)
    write_checkpoint(folder, {"vision_model.w": tensor})
    return folder


def weights_of(folder: Path) -> Any:
    return stored_tensors(folder, "vision_model")["vision_model.w"].read(0)


def described(folder: Path, payload: bytes) -> Callable[[], Any]:
    (checkpoint(folder) / ".metadata").write_bytes(payload)
    return lambda: weights_of(folder)


def piece(folder: Path, payload: bytes) -> Callable[[], Any]:
    """In the place of a tensor."""
    content = payloads.torch_archive(payload)
    description = pickle.loads((checkpoint(folder) / ".metadata").read_bytes())
    (place,) = description.storage_data.values()
    place.offset, place.length = (folder / place.relative_path).stat().st_size, len(content)
    with (folder / place.relative_path).open("ab") as file:
        file.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(description))
    return lambda: weights_of(folder)


def state_dict(folder: Path, payload: bytes) -> Callable[[], Any]:
    (folder / "pytorch_model.bin").write_bytes(payloads.torch_archive(payload))
    return lambda: weight_files.open_folder(folder)


def old_state_dict(folder: Path, payload: bytes) -> Callable[[], Any]:
    (folder / "w.pt").write_bytes(payloads.legacy_file(payload))
    return lambda: weight_files.open_file(folder / "w.pt")


def script(folder: Path, payload: bytes) -> Callable[[], Any]:
    with zipfile.ZipFile(folder / "jit.pt", "w") as archive:
        archive.writestr("jit/constants.pkl", b"\x80\x02).")
        archive.writestr("jit/code/__torch__.py", "import os; os.system('true')")
        archive.writestr("jit/data.pkl", payload)
    return lambda: weight_files.open_file(folder / "jit.pt")


def random_state(folder: Path, payload: bytes) -> Callable[[], Any]:
    content = payloads.torch_archive(payload)
    return lambda: pickles.read_state(io.BytesIO(content))


SINKS = {
    "the description": described,
    "a tensor": piece,
    "a state dict": state_dict,
    "an old state dict": old_state_dict,
    "TorchScript": script,
    "an object": random_state,
}


def test_the_gadgets_work(tmp_path: Path) -> None:
    """Or the tests below would prove nothing."""
    for number in range(len(payloads.gadgets(tmp_path / "none"))):
        (tmp_path / str(number)).mkdir()
        name, payload = list(payloads.gadgets(tmp_path / str(number) / "marker").items())[number]
        pickle.loads(payload)
        assert (tmp_path / str(number) / "marker").exists(), name


@pytest.mark.parametrize("sink", SINKS)
def test_no_gadget_runs(folder: Path, sink: str) -> None:
    """In no place where a pickle may stand; what it names is told."""
    reasons = r"is not part of a (tensor|checkpoint's description)|is neither a module nor a tensor"
    assert opened(folder, refusals(folder, sink, payloads.gadgets(folder.parent / "marker"), reasons)) == "done: []"


@pytest.mark.parametrize("sink", SINKS)
def test_no_pickle_takes_memory(folder: Path, sink: str) -> None:
    assert opened(folder, refusals(folder, sink, payloads.HUNGRY, "")) == "done: []"


def refusals(folder: Path, sink: str, all_payloads: dict[str, bytes], reasons: str) -> Callable[[], list[str]]:
    """Read all payloads; those that are not refused for one of the reasons."""
    actions = {}
    for number, (name, payload) in enumerate(all_payloads.items()):
        (folder / str(number)).mkdir()
        actions[name] = SINKS[sink](folder / str(number), payload)

    def read() -> list[str]:
        passed = []
        for name, action in actions.items():
            try:
                if (result := action()) is not None:  # of data that is plain, if odd
                    passed.append(f"{name}: {result!r}")
            except ValueError as error:
                if not re.search(reasons, str(error)):
                    passed.append(f"{name}: {error}")
        return passed

    return read


def test_the_readers_of_others_would_take_it(folder: Path) -> None:
    """So that the test above could fail: of a file that asks for 128 MB, Python's own takes them."""
    asked = b"\x80\x02Nr\x00\x00\x80\x000N."
    ours = io.BytesIO(payloads.torch_archive(asked))
    with pytest.raises(AssertionError, match=r"took 1\d\d MB"):
        opened(folder, lambda: pickle.loads(asked), most=1 << 26)
    assert opened(folder, lambda: pickles.read_state(ours), most=1 << 26) == "done: None"


def test_classes_are_not_changed(folder: Path) -> None:
    """Opcode BUILD sets attributes, of a class too."""
    owner = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n"
    act = described(folder, owner + pickle.dumps((None, {"state_dict_metadata": "x"}), 2)[2:-1] + b"b.")
    assert "it would change <class" in opened(folder, act)
    member = b"\x80\x02ctorch.distributed.checkpoint.planner\nWriteItemType\n(K\x01tR"
    (folder / ".metadata").write_bytes(member + pickle.dumps({"_value_": 7}, 2)[2:-1] + b"b.")
    assert "it would change <WriteItemType" in opened(folder, act)


def test_archives_are_not_unpacked(folder: Path) -> None:
    """A gigabyte of zeros in a megabyte, as a tensor and as the pickle itself."""
    archive = payloads.torch_archive(payloads.tensor(4, (4,), (1,)), deflated=bytes(1 << 24))
    (folder / "pytorch_model.bin").write_bytes(archive)
    assert "data/0 is compressed" in opened(folder, lambda: weight_files.open_folder(folder))
    (folder / "w.pt").write_bytes(payloads.zip_bomb("archive/data.pkl", 1 << 26))
    assert "data.pkl is compressed" in opened(folder, lambda: weight_files.open_file(folder / "w.pt"))


@pytest.mark.parametrize(
    ("size", "stride"),
    [((1 << 40,), (0,)), ((1 << 20, 1 << 20), (0, 0)), ((5,), (1,)), ((4,), (1 << 40,)), ((-1,), (1,))],
)
def test_a_tensor_is_no_larger_than_what_is_stored(folder: Path, size: Any, stride: Any) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", payloads.tensor(4, size, stride))
        archive.writestr("archive/data/0", bytes(16))
    (folder / "w.pt").write_bytes(content.getvalue())
    assert "is damaged" in opened(folder, lambda: weight_files.open_file(folder / "w.pt"))


def test_modules_in_modules_are_counted(folder: Path) -> None:
    """Forty of them, each twice in the next, are 2^40 names."""
    names = b"c__torch__\nM\n)\x81}"
    pickled = b"\x80\x02" + names + b"b"
    for index in range(40):
        pickled += b"q" + bytes([index]) + names + b"(X\x01\x00\x00\x00ah" + bytes([index])
        pickled += b"X\x01\x00\x00\x00bh" + bytes([index]) + b"ub"
    assert "modules" in opened(folder, script(folder, pickled + b"."))


# What a description says instead of the truth, by what is told of it.
LIES: dict[str, tuple[str, Any]] = {
    "'../outside.distcp', which is no file": ("relative_path", "../outside.distcp"),
    "'/etc/hostname', which is no file": ("relative_path", "/etc/hostname"),
    "beyond the end of __0_0.distcp": ("length", 1 << 40),
    "beyond the end of": ("offset", -1),
    "are read as they are": ("transform_descriptors", ["stream.zstd"]),
    "would have 4611686018427387904 bytes": ("size", torch.Size((1 << 60,))),
    "are stored": ("size", torch.Size((1 << 40, 0))),
}


@pytest.mark.parametrize("told", LIES)
def test_a_description_tells_of_what_is_there(folder: Path, told: str) -> None:
    description = pickle.loads((checkpoint(folder) / ".metadata").read_bytes())
    (folder.parent / "outside.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    (place,), (tensor,) = description.storage_data.values(), description.state_dict_metadata.values()
    name, value = LIES[told]
    setattr(tensor if name == "size" else place, name, value)
    (folder / ".metadata").write_bytes(pickle.dumps(description))
    assert told in opened(folder, lambda: weights_of(folder))


def test_honest_files_load(folder: Path) -> None:
    """All that torch.save makes of a model's state, and of a generator's, in every format."""
    state = {
        "plain": WEIGHT,
        "turned": torch.randn(3, 5).T,
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "tied": (tied := torch.randn(4)),
        "half of it": tied[2:],
        "one number": torch.tensor(3.0),
        **{str(kind): torch.ones(3).to(kind) for kind in (torch.bfloat16, torch.int8, torch.int16, torch.bool)},
    }
    model = torch.nn.Linear(2, 2).state_dict()  # an OrderedDict with an attribute
    state["large"] = torch.randn(pickles.SMALL_BYTES // 4)
    for is_zip in (True, False):
        if is_zip:  # torch does not read it back from the other
            state["float8"] = torch.ones(3).to(torch.float8_e4m3fn)
        else:
            del state["float8"]
        torch.save(state, folder / "w.pt", _use_new_zipfile_serialization=is_zip)
        found = pickles.read_state(folder / "w.pt")
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
            assert torch.equal(found[name].float(), tensor.float()), name
        torch.save(model, folder / "m.pt", _use_new_zipfile_serialization=is_zip)
        assert all(torch.equal(tensor, model[name]) for name, tensor in pickles.read_state(folder / "m.pt").items())
    plain = {"step": 3, "\u00fc": b"\x00\xff", "sizes": torch.Size((2, 3)), "set": {1}, "nothing": None}
    plain |= {"groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}], "dtype": torch.bfloat16}
    torch.save(plain, content := io.BytesIO())
    assert pickles.read_state(content) == plain
    assert torch.equal(weights_of(checkpoint(folder)), WEIGHT)
