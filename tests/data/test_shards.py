import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from megatron.energon import CrudeWebdataset

from mmcore.data.shards import META_DIR, SUMS_FILE, ShardWriter
from tests.data.fabricated import picture


def write(output: Path, *, samples: int = 7, overwrite: bool = False) -> Path:
    with ShardWriter(output, samples_per_shard=3, overwrite=overwrite) as writer:
        for index in range(samples):
            data = picture(index, (5 + 3 * index, 6))
            pictures = {"0.png": data, "1.png": data[::-1]} if index == 2 else {"png": data}
            writer.write("val" if index == 4 else "train", f"{index:08d}", {**pictures, "json": b"{}" * index})
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_energons_own_prepare_makes_the_same_metadata(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    names = sorted(path.name for path in ours.glob("*.tar"))
    for name in names:
        shutil.copy(ours / name, theirs)
    CrudeWebdataset.prepare_dataset(
        theirs, names, split_parts_patterns=[("train", "train_.*"), ("val", "val_.*")], workers=1
    )
    for name in names:
        assert (ours / f"{name}.idx").read_bytes() == (theirs / f"{name}.idx").read_bytes()
    for name, read in ((".info.json", json.loads), ("split.yaml", yaml.safe_load)):
        assert read((ours / META_DIR / name).read_text()) == read((theirs / META_DIR / name).read_text())


def test_shards_are_what_tarfile_would_write(tmp_path: Path) -> None:
    for path in sorted(write(tmp_path / "out").glob("*.tar")):
        buffer = io.BytesIO()
        with tarfile.open(path) as read, tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as again:
            for member in read:
                copy = tarfile.TarInfo(member.name)
                copy.size = member.size
                again.addfile(copy, read.extractfile(member))
        assert path.read_bytes() == buffer.getvalue()


def test_the_same_samples_give_the_same_bytes_and_their_hashes(tmp_path: Path) -> None:
    first, second = files(write(tmp_path / "a")), files(write(tmp_path / "b"))
    assert first == second
    sums = {line[66:]: line[:64] for line in first[SUMS_FILE].decode().splitlines()}
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in first.items() if name.endswith(".tar")}
    assert set(sums) == {"train_000000.tar", "train_000001.tar", "val_000000.tar"}


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(output: Path, overwrite: bool) -> None:
        with pytest.raises(KeyboardInterrupt), ShardWriter(output, overwrite=overwrite) as writer:
            writer.write("train", "0", {"json": b"{}"})
            raise KeyboardInterrupt

    fail(tmp_path / "new" / "out", overwrite=False)
    assert list((tmp_path / "new").iterdir()) == []
    before = files(write(tmp_path / "old"))
    fail(tmp_path / "old", overwrite=True)
    assert files(tmp_path / "old") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_an_existing_output_is_replaced_only_when_told(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out exists: .* --overwrite"):
        write(tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    write(tmp_path / "out", samples=2, overwrite=True)
    assert "old" not in files(tmp_path / "out") and len(list((tmp_path / "out").glob("*.tar"))) == 1
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        ShardWriter(tmp_path / "file", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def write_resumable(output: Path, *, stop_at: int = 100, fingerprint: str = "same", per_shard: int = 3) -> list[int]:
    """Ten samples, or until `stop_at`; the numbers that were written in this call."""
    written = []
    with ShardWriter(output, samples_per_shard=per_shard, fingerprint=fingerprint) as writer:
        for index in range(writer.state.get("next", 0), 10):
            if index == stop_at:
                raise KeyboardInterrupt
            if index == 8:
                writer.end("train")
            split = "val" if index >= 8 else "train"
            written.append(index)
            if writer.write(split, f"{index:08d}", {"json": b"{}" * index}):
                writer.mark({"next": index + 1})
    return written


def test_an_interrupted_job_goes_on_from_its_last_finished_shard(tmp_path: Path) -> None:
    assert write_resumable(tmp_path / "whole") == list(range(10))
    for stop_at, resumed_from in ((2, 0), (3, 3), (5, 3), (6, 6), (8, 6), (9, 6)):
        output = tmp_path / str(stop_at)
        with pytest.raises(KeyboardInterrupt):
            write_resumable(output, stop_at=stop_at)
        assert not output.exists()
        assert write_resumable(output) == list(range(resumed_from, 10))
        assert files(output) == files(tmp_path / "whole")
        assert {path.name for path in tmp_path.iterdir()} == {"whole", str(stop_at)}
        shutil.rmtree(output)


@pytest.mark.parametrize("change", ["fingerprint", "size", "lost", "shards", "none"])
def test_nothing_is_taken_over_from_another_job_or_a_damaged_one(tmp_path: Path, change: str) -> None:
    output = tmp_path / "out"
    first = "" if change == "none" else "same"
    with pytest.raises(KeyboardInterrupt):
        write_resumable(output, stop_at=7, fingerprint=first)
    left = tmp_path / ".out.incomplete"
    assert (left / "train_000001.tar.idx").exists()
    if change == "size":
        os.truncate(left / "train_000000.tar", 100)
    if change == "lost":
        (left / "train_000001.tar.idx").unlink()
    second = "other" if change == "fingerprint" else first
    assert write_resumable(output, fingerprint=second, per_shard=4 if change == "shards" else 3) == list(range(10))
    assert not left.exists()


def test_two_jobs_do_not_write_the_same_output(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        with pytest.raises(ValueError, match="another job is writing"):
            write(tmp_path / "out")
        writer.write("train", "0", {"json": b"{}"})
    assert (tmp_path / "out" / "train_000000.tar").exists()
    assert not (tmp_path / "out" / ".lock").exists()
