"""A run's folders: damage is found and kept, room is made without a torn checkpoint, a full disk is foreseen."""

import json
import os
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmcore import checkpoint_files as files
from mmcore.config import CheckpointConfig
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION, compose

Usage = namedtuple("Usage", "total used free")


def write(run: Path, step: int) -> Path:
    folder = files.step_folder(run, step)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "weights.distcp").write_bytes(bytes(range(256)) * 40)
    (folder / "run.json").write_text("{}\n")
    (folder / "tokenizer" / "words").write_text("one two")
    files.write_manifest(folder, {})
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": (lambda folder: flip(folder / "weights.distcp"), "weights.distcp has other content than was written"),
    "truncated": (
        lambda folder: os.truncate(folder / "weights.distcp", 7),
        "weights.distcp has 7 bytes instead of 10240",
    ),
    "emptied": (lambda folder: os.truncate(folder / "run.json", 0), "run.json has 0 bytes instead of 3"),
    "missing": (lambda folder: (folder / "tokenizer" / "words").unlink(), "tokenizer/words is missing"),
    "a folder": (
        lambda folder: ((folder / "run.json").unlink(), (folder / "run.json").mkdir()),
        "run.json has",
    ),
    "torn manifest": (lambda folder: os.truncate(folder / "manifest.json", 20), "manifest.json cannot be read"),
    "no manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert files.verify(folder) == []
    damage, expected = DAMAGE[kind]
    damage(folder)
    (problem,) = files.verify(folder)
    assert problem.startswith(expected)


def test_every_file_falls_to_one_part(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    for name in ("weights.distcp", "run.json", "tokenizer/words"):
        (folder / name).unlink()
    found = [files.verify(folder, part=part, parts=2) for part in range(2)]
    assert [len(part) for part in found] == [2, 1] and sorted([*found[0], *found[1]]) == sorted(files.verify(folder))


def test_sums_taken_while_writing_are_recorded(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    files.write_manifest(folder, {"run.json": (3, 5)})
    assert files.verify(folder) == ["run.json has other content than was written"]
    content = json.loads((folder / "manifest.json").read_text())
    assert content["weights.distcp"] == [10240, files.checksum(folder / "weights.distcp")[1]]


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """Also one by which it names another file that is there, or its last line break."""
    folder = write(tmp_path, 1)
    for rank in range(2):
        (folder / f"loader_{rank}.json").write_text("{}")
    files.write_manifest(folder, {})
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))]
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(content))
    for content in damaged:
        manifest.write_bytes(content)
        (problem,) = files.verify(folder)
        assert problem.startswith("manifest.json ")
    manifest.write_bytes(whole)
    assert files.verify(folder) == []


def test_set_aside_never_replaces(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        names.append(files.set_aside(write(tmp_path, 4)).name)
    assert names == ["damaged-step_00000004", "damaged-step_00000004-2", "damaged-step_00000004-3"]
    assert files.step_folders(tmp_path) == []
    assert all(files.verify(tmp_path / name) == [] for name in names)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [(1, 0, [60]), (2, 0, [50, 60]), (1, 30, [30, 60]), (2, 20, [20, 40, 50, 60])],
)
def test_what_is_kept(keep_last: int, keep_every: int, expected: list[int]) -> None:
    assert files.kept([10, 20, 30, 40, 50, 60], keep_last, keep_every) == expected


@pytest.mark.parametrize(
    ("keep_best", "best", "expected"),
    [
        (1, [20, 60, 10], [20, 60]),
        (2, [60, 20, 10], [20, 60]),
        (3, [60, 20, 10], [10, 20, 60]),
        (1, [35, 10], [10, 60]),  # 35 is gone, or was never kept
        (2, [], [60]),
        (0, [20], [60]),
    ],
)
def test_the_best_are_kept(keep_best: int, best: list[int], expected: list[int]) -> None:
    assert files.kept([10, 20, 30, 40, 50, 60], 1, 0, keep_best, best) == expected


def test_the_newest_stays_however_bad_it_is(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    files.prune(tmp_path, CheckpointConfig(keep_last=1, keep_best=1), [20, 10, 30])
    assert [folder.name for folder in files.step_folders(tmp_path)] == ["step_00000020", "step_00000030"]


def test_killed_while_it_makes_room(tmp_path: Path, monkeypatch: Any) -> None:
    """The name goes first, so that what is half deleted is no checkpoint; the next save clears it away."""
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    files.set_aside(write(tmp_path, 35))

    def killed(folder: Path) -> None:
        (folder / "run.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        files.prune(tmp_path, CheckpointConfig(save_interval=10, keep_last=2, keep_every=20))
    assert [folder.name for folder in files.step_folders(tmp_path)] == [f"step_000000{step}" for step in (20, 30, 40)]
    assert all(files.verify(folder) == [] for folder in files.step_folders(tmp_path))
    (tmp_path / ".log.jsonl.4242").write_text("half of a row")
    files.clear_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged-step_00000035",
        *(f"step_000000{step}" for step in (20, 30, 40)),
    ]


def events(action: Callable[[], object], killed_at: int) -> bool:
    """Run `action` in a process that is killed right before its n-th act on the disk; whether it came to its end."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    seen = 0

    def count(event: str, arguments: object) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.rmdir"):
            seen += 1
            if seen == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        action()
    finally:
        os._exit(0 if sys.exc_info()[0] is None else 1)


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_every_act_on_the_disk(replaces: bool, tmp_path: Path) -> None:
    """From the manifest to the last deletion: what has a checkpoint's name is one, and there always is one."""
    names = set()
    for killed_at in range(1, 200):
        run = tmp_path / str(killed_at)
        for step in (1, 2, 3) if replaces else (1, 2):
            write(run, step)
        folder = write(run / "elsewhere", 3).rename(run / ".incomplete-step_00000003")
        (folder / "manifest.json").unlink()

        def save(run: Path = run, folder: Path = folder) -> None:
            files.write_manifest(folder, {})
            files.publish(folder, files.step_folder(run, 3))
            files.prune(run, CheckpointConfig(keep_last=1))

        is_done = events(save, killed_at)
        files.clear_incomplete(run)
        found = files.step_folders(run)
        assert found and all((path / "manifest.json").exists() and not files.verify(path) for path in found)
        names.add(tuple(path.name[-1] for path in found))
        if is_done:
            break
    assert names == {("1", "2", "3"), ("2", "3"), ("3",)} | (set() if replaces else {("1", "2")})
    assert is_done and killed_at > 20


def test_published_in_the_place_of_an_older_one(tmp_path: Path) -> None:
    old = write(tmp_path, 1)
    new = write(tmp_path / "elsewhere", 1).rename(tmp_path / ".incomplete-step_00000001")
    (new / "run.json").write_text("[]\n")
    files.publish(new, old)
    assert (old / "run.json").read_text() == "[]\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "step_00000001"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "steps", "expected"),
    [(1, 0, 100, 2), (2, 0, 100, 3), (2, 0, 20, 2), (1, 20, 100, 6), (5, 0, 5, 1), (1, 0, 15, 2)],
)
def test_most_checkpoints_at_once(keep_last: int, keep_every: int, steps: int, expected: int) -> None:
    """A new one is whole before an old one goes."""
    config = CheckpointConfig(save_interval=10, keep_last=keep_last, keep_every=keep_every)
    assert files.most_at_once(config, steps) == expected


@pytest.mark.parametrize(("keep_every", "steps", "expected"), [(0, 100, 4), (0, 20, 2), (20, 100, 8), (10, 100, 10)])
def test_most_checkpoints_at_once_with_the_best(keep_every: int, steps: int, expected: int) -> None:
    """At worst the two best are others than those that stay anyway."""
    config = CheckpointConfig(save_interval=10, keep_last=1, keep_every=keep_every, keep_best=2)
    assert files.most_at_once(config, steps) == expected


def test_too_little_disk(tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "runs" / "new"
    config = CheckpointConfig(save=str(run), save_interval=10, keep_last=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 29_999) if folder == tmp_path else None)
    files.check_disk(config, 100, 9_999)
    with pytest.raises(
        ValueError, match=rf"{run} has too little room: 3 checkpoints of 1e-05 GB at once need 3e-05 GB, "
    ):
        files.check_disk(config, 100, 10_000)
    write(run, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 20_000) if folder == run else None)
    files.check_disk(config, 100, 10_000)  # 10 KB are the run's own, which go before the third is written
    files.set_aside(files.step_folder(run, 10))
    with pytest.raises(ValueError, match="2e-05 GB are free there: free some"):
        files.check_disk(config, 100, 10_000)


@pytest.mark.parametrize(
    ("freezes", "expected"),
    [
        ([()], set()),
        ([("vision_model",)], {"vision_model"}),
        ([("vision_model", "language_model"), ("vision_model",)], {"vision_model"}),
        ([(r"language_model\.decoder", "vision_model")], {"language_model", "vision_model"}),
        ([(".*norm",)], {"vision_model", "vision_projection", "language_model"}),
    ],
)
def test_what_may_never_be_trained(freezes: list[tuple[str, ...]], expected: set[str]) -> None:
    assert files.never_trained(freezes) == expected


def test_bytes_of_a_seven_billion_model() -> None:
    """bf16 weights, and 12 bytes of optimizer for each parameter that is trained."""
    language = LANGUAGE["mistral_7b_v03"]
    architecture = compose(VISION["clip_vit_l_14_336"], language, PROJECTOR["mlp2x_gelu"](language))
    everything = files.checkpoint_bytes(architecture, (), 2)
    projector = files.checkpoint_bytes(architecture, ("vision_model", "language_model"), 2)
    assert 100e9 < everything < 110e9 and 15e9 < projector < 16e9
    assert files.checkpoint_bytes(replace(architecture, vision=None, vision_projection=None), (), 4) > 100e9
