"""What is damaged is never loaded: it is refused, the file is named, and the run goes on from the checkpoint before."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmcore import checkpoint
from mmcore import checkpoint_files as files
from mmcore.config import ParallelConfig
from tests import ranks, tiny
from tests.faults.chain import STEPS
from tests.faults.jobs import small
from tests.faults.size import SIZE

# What is done to one file: its name, and what it holds then.
Damage = Iterator[tuple[str, bytes]]


def names(folder: Path) -> list[str]:
    """Of all files, the manifest among them."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flips(good: Path, newest: Path, draw: random.Random) -> Damage:
    """One bit, in each of the files in turn."""
    for number in range(SIZE.flips):
        name = names(newest)[number % len(names(newest))]
        content = bytearray((newest / name).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield name, bytes(content)


def swaps(good: Path, newest: Path, draw: random.Random) -> Damage:
    """What another file holds: the one of that name in the checkpoint before, or any of this one."""
    every, given = names(newest), 0
    while given < SIZE.swaps:
        name = draw.choice(every)
        other = good / name if given % 2 else newest / draw.choice(every)
        content = other.read_bytes()
        if content != (newest / name).read_bytes():  # as are model.json and the tokenizer of all steps
            given += 1
            yield name, content


def truncations(good: Path, newest: Path, draw: random.Random) -> Damage:
    """Cut short anywhere, in each of the files in turn: at once, before its last byte, or between."""
    for number in range(SIZE.truncations):
        name = names(newest)[number % len(names(newest))]
        content = (newest / name).read_bytes()
        yield name, content[: draw.choice([0, len(content) - 1, draw.randrange(len(content))])]


@pytest.mark.parametrize("damage", [flips, swaps, truncations])
def test_damage_is_never_loaded(
    damage: Callable[[Path, Path, random.Random], Damage], whole: Path, tmp_path: Path, tell: Any
) -> None:
    """Over all files of a checkpoint that two ranks have written; by a run that goes on, and alone."""
    for step in (STEPS - 1, STEPS):
        shutil.copytree(files.step_folder(whole, step), files.step_folder(tmp_path, step))

    def load() -> set[str]:
        good, newest = files.step_folders(tmp_path)
        model, seen = tiny.build(ParallelConfig(), arch=small(300)), set()
        assert checkpoint.newest_whole(tmp_path) == (newest, [])
        for name, content in damage(good, newest, random.Random(11)):
            was = (newest / name).read_bytes()
            assert content != was
            (newest / name).write_bytes(content)
            weights = [parameter.detach().clone() for parameter in model.parameters()]
            with pytest.raises(ValueError) as raised:
                checkpoint.load_checkpoint(newest, model)
            # A manifest of another checkpoint is whole in itself: the files that contradict it are named.
            named = "" if damage is swaps and name == files.MANIFEST_FILE else f"{name} "
            assert str(raised.value).startswith(f"{newest} is damaged: {named}"), raised.value
            assert all(before.equal(now) for before, now in zip(weights, model.parameters(), strict=True))
            found, told = checkpoint.newest_whole(tmp_path)
            aside = newest.with_name(files.DAMAGED + newest.name)
            assert found == good and len(told) == 1, told
            assert told[0].startswith(f"{newest} is damaged: {named}") and told[0].endswith(f"goes on from {good.name}")
            assert (aside / name).read_bytes() == content  # nothing is deleted
            aside.rename(newest)
            (newest / name).write_bytes(was)
            seen.add(name)
        assert checkpoint.newest_whole(tmp_path) == (newest, [])
        assert damage is swaps or seen == set(names(newest))
        checkpoint.load_checkpoint(newest, model)
        return seen

    (seen,) = ranks.run(load, ParallelConfig(), 1, timeout=600)
    number = {"flips": SIZE.flips, "swaps": SIZE.swaps, "truncations": SIZE.truncations}[damage.__name__]
    tell("corruption never loads", f"{number} {damage.__name__} in {len(seen)} files: all refused, the file named")
