"""A stranger's dataset: what its YAML names is not run, and what its shards hold is refused one by one, and counted."""

import io
import json
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset.utils
import yaml

from mmcore.data import dataset as dataset_module
from mmcore.data.dataset import open_dataset
from mmcore.data.shards import META_DIR
from mmcore.data.task_encoder import build_layout, encode_sample, lay_out
from mmcore.foreign import expand
from tests.data import fabricated
from tests.security import payloads
from tests.security.payloads import member
from tests.security.sandbox import opened

TALK = json.dumps({"conversations": fabricated.conversation("<image>\nwhat is it", "it is a picture")}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: Any) -> Any:
    tokenizer = fabricated.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return build_layout(tokenizer, "mistral_instruct", fabricated.pictures(tokenizer.vocab_size), 64)


def recipes(marker: Path) -> dict[str, dict[str, Any]]:
    """What dataset.yaml may hold, and what a blend may."""
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    call = {"__module__": "os", "__function__": "system", "command": f"touch {marker}"}
    return {
        "a function": call,
        "a function with keywords": {"__module__": "subprocess", "__function__": "getoutput", "cmd": f"touch {marker}"},
        "a class": {"__module__": "subprocess", "__class__": "Popen", "args": ["touch", str(marker)]},
        "a module that runs as it is imported": {"__module__": "planted", "__class__": "CrudeWebdataset"},
        "inside of another": {**crude, "subflavors": {"x": call}},
        "a function of energon's": {"__module__": "megatron.energon", "__function__": "get_savable_loader"},
        "a program beside the data": {
            "__module__": "megatron.energon",
            "__class__": "CaptioningWebdataset",
            "sample_loader": "loader.py:sample_loader",
            "part_filter": "loader.py:part_filter",
        },
    }


@pytest.mark.parametrize("name", recipes(Path("marker")))
def test_what_a_recipe_names_is_not_run(folder: Path, name: str) -> None:
    """Neither as the description of a dataset nor as a blend of some."""
    path = fabricated.write_shards(folder / "dataset", 4)
    program = f"open({str(folder.parent / 'marker')!r}, 'w')\ndef sample_loader(x): ...\ndef part_filter(x): ..."
    for place in (path / META_DIR / "loader.py", folder / "planted.py"):
        place.write_text(program)
    text = yaml.safe_dump(recipes(folder.parent / "marker")[name])
    (path / META_DIR / "dataset.yaml").write_text(text)
    (folder / "blend.yaml").write_text(text)

    def refusals() -> list[str]:
        found = []
        for recipe in (path, folder / "blend.yaml"):
            with pytest.raises(ValueError, match="is no readable energon dataset") as raised:
                open_dataset(str(recipe))
            found.append(str(raised.value))
        return found

    told = opened(folder, refusals)
    assert told.startswith("done: ") and "would be run" in told, told


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("split.yaml", {"split_parts": {"train": ["train_{0..99999999999}.tar"]}}, "more than 1048576 names"),
        ("split.yaml", {"split_parts": {"train": ["{0..999}" * 20]}}, "more than 1048576 names"),
        ("split.yaml", {"split_parts": {"train": ["{a,b}" * 40]}}, "more than 1048576 names"),
        ("split.yaml", {"split_parts": {"train": ["{" + "{0..999}" * 4 + ",b}"]}}, "braces in braces"),
        ("split.yaml", {"split_parts": {"train": ["../outside.tar"]}}, "leads out of its folder"),
        ("split.yaml", {"split_parts": {"train": ["/etc/hostname"]}}, "leads out of its folder"),
        (".info.json", "[" * 100_000, "RecursionError"),
        (".info.json", {"shard_counts": {"train_000000.tar": 1 << 60}}, "is not the index of"),
        (".info.json", {"shard_counts": {"train_000000.tar": -1}}, "is not the index of"),
        ("dataset.yaml", "[" * 100_000 + "]" * 100_000, "RecursionError"),
        ("dataset.yaml", "a: &a [b, b]\nc: *a\n", "no readable energon dataset"),
        ("dataset.yaml", "!!python/object/apply:os.system ['touch ../marker']", "no readable energon dataset"),
    ],
)
def test_what_a_dataset_says_of_itself(folder: Path, file: str, content: Any, told: str) -> None:
    path = fabricated.write_shards(folder / "dataset", 4)
    (folder / "outside.tar").write_bytes((path / "train_000000.tar").read_bytes())
    (folder / "outside.tar.idx").write_bytes((path / "train_000000.tar.idx").read_bytes())
    if file == "split.yaml":
        counts = dict.fromkeys(content["split_parts"]["train"], 4)
        content = {**content, "exclude": []}
        info = json.loads((path / META_DIR / ".info.json").read_text())
        (path / META_DIR / ".info.json").write_text(json.dumps({**info, "shard_counts": counts}))
    elif isinstance(content, dict):
        content = {"energon_version": "7.4.1", **content}
    (path / META_DIR / file).write_text(content if isinstance(content, str) else json.dumps(content))
    outcome = opened(folder, lambda: open_dataset(str(path)))
    assert outcome.startswith("ValueError: ") and told in outcome, outcome


def test_a_blend_repeats_no_dataset_for_ever(folder: Path) -> None:
    fabricated.write_shards(folder / "dataset", 4)
    part = {"path": "./dataset", "repetitions": 10**12}
    blend = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    (folder / "blend.yaml").write_text(json.dumps({**blend, "splits": {"train": {"blend_epochized": [part]}}}))
    assert "1000000000000 times" in opened(folder, lambda: open_dataset(str(folder / "blend.yaml")))


def pax(name: str, content: bytes, **fields: str) -> bytes:
    """A file with an extended header."""
    lines = b""
    for key, value in fields.items():
        line = f" {key.replace('_', '.')}={value}\n".encode()
        length = len(line) + len(str(len(line) + 2))
        lines += str(length).encode() + line
    return member("pax", lines, type=tarfile.XHDTYPE) + member(name, content)


# A sample's stretch of a shard, and what is told of it. Honest parts follow the hostile one.
REST = member("x.json", TALK) + member("x.png", fabricated.picture(1))
STRETCHES: dict[str, tuple[bytes, str]] = {
    "a symbolic link": (member("x.jpg", type=tarfile.SYMTYPE, linkname="/etc/hostname"), "is a link, a device"),
    "a hard link": (member("x.jpg", type=tarfile.LNKTYPE, linkname="x.json"), "is a link, a device"),
    "a pipe": (member("x.jpg", type=tarfile.FIFOTYPE), "is a link, a device"),
    "a device": (member("x.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "is a link, a device"),
    "a disk": (member("x.jpg", type=tarfile.BLKTYPE, devmajor=8), "is a link, a device"),
    "a name that leads up": (member("../../x.txt", b"x"), "leads out of its folder"),
    "an absolute name": (member("/tmp/x.txt", b"x"), "leads out of its folder"),
    "an absolute name of many letters": (member(f"/{'d/' * 90}x.txt", b"x"), "leads out of its folder"),
    "a size below zero": (member("x.txt", size=-512), "would have -512 bytes"),
    "a size below zero behind a folder": (
        member("d", type=tarfile.DIRTYPE) + member("x.txt", size=-512),
        "would have -512 bytes",
    ),
    "a size of terabytes": (member("x.txt", size=1 << 42), "would have 4398046511104 bytes"),
    "a size of terabytes behind a folder": (
        member("d", type=tarfile.DIRTYPE) + member("x.txt", size=1 << 42),
        "would have 4398046511104 bytes",
    ),
    "a sparse file of terabytes": (
        pax("x.txt", b"0\n0\n", GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize=str(1 << 42)),
        "cannot be read",
    ),
    "names of names of names": (member("././@LongLink", b"x\0", type=tarfile.GNUTYPE_LONGNAME) * 2000, "recursion"),
    "no tar at all": (b"x" * 1024, "cannot be read"),
    "deep JSON": (member("x.json", b"[" * 100_000), "nested too deeply"),
    "JSON that is barely parsed": (member("x.json", b"[" * 990 + b"]" * 990), ""),
    "a picture of billions of pixels": (
        member("x.json", TALK) + member("x.png", payloads.png(60_000, 60_000, rows=1)),
        "3600000000 pixels",
    ),
    "a program for a picture": (
        member("x.json", TALK) + member("x.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        "not a picture",
    ),
}


def shard(folder: Path, stretch: bytes) -> Path:
    """A dataset of one sample."""
    path = fabricated.write_shards(folder / "dataset", 1)
    (path / "train_000000.tar").write_bytes(stretch + bytes(1024))
    (path / "train_000000.tar.idx").write_bytes(struct.pack("<2Q", 0, len(stretch)))
    return path


def used(path: Path, layout: Any) -> Callable[[], Any]:
    """Read a dataset's first sample as training does."""

    def read() -> str:
        raw = open_dataset(str(path)).sources[0].read(0)
        assert raw is not None
        return encode_sample(raw.key, raw.parts, lay_out(raw.parts, layout), layout).key

    return read


@pytest.mark.parametrize("name", STRETCHES)
def test_a_hostile_sample_is_refused(folder: Path, layout: Any, name: str) -> None:
    hostile, told = STRETCHES[name]
    rest = b"" if b"x.json" in hostile else REST
    outcome = opened(folder, used(shard(folder, hostile + rest), layout))
    assert re.match("ValueError: ", outcome) and told in outcome, outcome


def test_programs_among_the_parts_are_bytes(folder: Path, layout: Any) -> None:
    """webdataset would unpickle the first three."""
    marker = folder.parent / "marker"
    pickled = payloads.gadgets(marker)["posix.system"]
    programs = b"".join(member(f"x.{name}", pickled) for name in ("pkl", "pyd", "pickle", "pth", "npy", "py", "so"))
    assert opened(folder, used(shard(folder, programs + REST), layout)) == "done: x"
    assert webdataset.utils.enforce_security


@pytest.mark.parametrize("offsets", [(0, 1 << 62), (1 << 50, 1 << 50), (4096, 0), (0, (1 << 64) - 1)])
def test_an_index_that_lies(folder: Path, layout: Any, offsets: tuple[int, int]) -> None:
    path = shard(folder, REST)
    (path / "train_000000.tar.idx").write_bytes(struct.pack("<2Q", *offsets))
    assert "sample 0 of" in opened(folder, used(path, layout))


def test_a_hole_of_a_terabyte(folder: Path, layout: Any) -> None:
    path = shard(folder, REST)
    with (path / "train_000000.tar").open("r+b") as file:
        file.truncate(1 << 40)
    (path / "train_000000.tar.idx").write_bytes(struct.pack("<2Q", 0, 1 << 40))
    assert f"at most {dataset_module.MAX_SAMPLE_BYTES} are read" in opened(folder, used(path, layout))


def test_training_goes_on_without_them(tmp_path: Path, capfd: Any) -> None:
    """One of twenty is hostile: it is left out, named and counted."""
    path = fabricated.write_shards(tmp_path / "dataset", 20)
    offsets = struct.unpack("<21Q", (path / "train_000000.tar.idx").read_bytes())
    link = member("00000007.json", type=tarfile.SYMTYPE, linkname="/etc/hostname")
    with (path / "train_000000.tar").open("r+b") as file:
        file.seek(offsets[7])
        file.write(link)
    tokenizer = fabricated.tokenizer(tmp_path / "tokenizer")
    loader = fabricated.loader(path, tokenizer, data={"max_skipped": 0.5})
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    loader.close()
    assert loader.skipped == 1
    assert "sample 7 of" in capfd.readouterr().err


def test_honest_names_and_archives(folder: Path, layout: Any) -> None:
    assert expand("train_{000008..000010}.tar") == [f"train_{n:06d}.tar" for n in (8, 9, 10)]
    assert expand("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"] and expand("plain.tar") == ["plain.tar"]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=kind) as tar:
            tar.addfile(tarfile.TarInfo("f" * 90), io.BytesIO()) if kind == tarfile.PAX_FORMAT else None
            for name, data in ((f"./{'d/' * 60}x.json", TALK), (f"./{'d/' * 60}x.png", fabricated.picture(1))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        stretch = content.getvalue().rstrip(b"\0")
        place = folder / str(kind)
        place.mkdir()
        told = opened(folder, used(shard(place, stretch + bytes(-len(stretch) % 512)), layout))
        assert told.endswith("d/x"), told
