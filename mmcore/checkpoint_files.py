"""The folders of a run: which are whole, which are set aside, which make room. No torch, no process group.

    RUN/step_00000100/              a published checkpoint; mmcore.checkpoint lists its files
    RUN/.incomplete-step_00000200/  one that is being written or deleted, or was when the run was killed
    RUN/damaged-step_00000100/      one whose files are not those that were written: kept, never counted

A folder gets and loses its name `step_*` by one rename, so no kill leaves half a checkpoint under it.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from mmcore.config import CheckpointConfig
from mmcore.constants import MODULES
from mmcore.models.architecture import Architecture
from mmcore.models.parameters import num_parameters

MANIFEST_FILE = "manifest.json"
INCOMPLETE, DAMAGED = ".incomplete-", "damaged-"
_REPLACED = INCOMPLETE + "replaced-"

# How a disk says that what was written is not on it.
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)

# Bytes of a trained parameter's master and two moments: float32 in a checkpoint, whatever --optimizer.states are.
OPTIMIZER_BYTES = 12

Checksum = tuple[int, int]
"""Bytes and CRC-32 of a file."""


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """All that look like checkpoints of a run, whole or not, oldest first."""
    return sorted(path for path in run.glob("step_*") if path.is_dir() and path.name.removeprefix("step_").isdigit())


def checksum(path: Path) -> Checksum:
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return size, crc


def write_manifest(folder: Path, known: Mapping[str, Checksum]) -> None:
    """Record bytes and CRC-32 of every file below `folder`.

    Args:
        known: those of files that were summed when they were written, by name.
    """
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    content = {name: known.get(name) or checksum(folder / name) for name in names if name != MANIFEST_FILE}
    (folder / MANIFEST_FILE).write_text(_manifest(content))


def _manifest(content: Mapping[str, Checksum]) -> str:
    """Its text. The last entry is the manifest's own, of the entries before it: one of its bits could name another file
    that is there too, and leave the first one out."""
    others = json.dumps(content, indent=1).encode()
    return json.dumps({**content, MANIFEST_FILE: (len(others), zlib.crc32(others))}, indent=1) + "\n"


def verify(folder: Path, *, part: int = 0, parts: int = 1, checksums: bool = True) -> list[str]:
    """What differs from the manifest, file by file; nothing to compare without one.

    Args:
        part: of `parts` that the files are dealt to, the one to look at.
        checksums: whether files are read, or their sizes are looked at alone.
    """
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return []
    try:
        text = manifest.read_text()
        content = {str(name): (int(size), int(crc)) for name, (size, crc) in json.loads(text).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f"{MANIFEST_FILE} cannot be read ({error})"]
    content.pop(MANIFEST_FILE, None)
    if _manifest(content) != text:
        return [f"{MANIFEST_FILE} has other content than was written"]
    found = (_difference(folder, name, content[name], checksums) for name in list(content)[part::parts])
    return [problem for problem in found if problem]


def _difference(folder: Path, name: str, expected: Checksum, checksums: bool) -> str:
    path = folder / name
    try:
        if path.stat().st_size != expected[0]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected[0]}"
        return "" if not checksums or checksum(path) == expected else f"{name} has other content than was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def publish(folder: Path, final: Path) -> None:
    """Give a complete folder its name, once all of it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    if final.exists():  # a run that went back comes by again
        replaced = final.with_name(_REPLACED + final.name)
        final.rename(replaced)
        folder.rename(final)
        shutil.rmtree(replaced)
    else:
        folder.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno in _LOST:  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def clear_incomplete(run: Path) -> None:
    """Delete what a kill left behind in the middle of writing or deleting; the job is the only one that writes here."""
    for replaced in run.glob(_REPLACED + "*"):
        final = run / replaced.name.removeprefix(_REPLACED)
        if not final.exists():  # killed between the two renames of `publish`
            replaced.rename(final)
    for leftover in run.glob(INCOMPLETE + "*"):
        shutil.rmtree(leftover)
    for part in run.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", part.name) and part.is_file():  # mmcore.evaluation.scores.write_whole's
            part.unlink()


def set_aside(folder: Path) -> Path:
    """Take a damaged checkpoint out of the run's sight, deleting nothing; returns where it lies then."""
    for attempt in range(1, 10_000):
        aside = folder.with_name(DAMAGED + folder.name + (f"-{attempt}" if attempt > 1 else ""))
        if not aside.exists():
            return folder.rename(aside)
    raise AssertionError(f"no name is left for {folder}")


def kept(
    steps: Sequence[int], keep_last: int, keep_every: int, keep_best: int = 0, best: Iterable[int] = ()
) -> list[int]:
    """Of steps in rising order those whose checkpoints stay: the last, the best and the multiples of `keep_every`.

    Args:
        best: steps with a score, the best first; what has no checkpoint any more takes no place.
    """
    stay = set([step for step in best if step in steps][:keep_best])
    return [
        step
        for index, step in enumerate(steps)
        if index >= len(steps) - keep_last or (keep_every > 0 and step % keep_every == 0) or step in stay
    ]


def prune(run: Path, config: CheckpointConfig, best: Iterable[int] = ()) -> None:
    """Delete the checkpoints that the run does not keep.

    Args:
        best: as for `kept`.
    """
    whole = [folder for folder in step_folders(run) if (folder / MANIFEST_FILE).is_file()]  # others take no place
    folders = {int(folder.name.removeprefix("step_")): folder for folder in whole}
    staying = kept(sorted(folders), config.keep_last, config.keep_every, config.keep_best, best)
    for step in sorted(folders.keys() - set(staying)):
        going = folders[step].rename(folders[step].with_name(INCOMPLETE + folders[step].name))
        shutil.rmtree(going)


def checkpoint_bytes(architecture: Architecture, frozen: Collection[str], weight_bytes: int) -> int:
    """Bytes of one checkpoint on the disk, but for what is small beside tensors; the same at every layout.

    Args:
        frozen: parts that are not trained (`mmcore.constants.MODULES`), of which the optimizer keeps nothing.
        weight_bytes: of one weight: 2 in bf16, 4 in fp32.
    """
    return sum(
        count * (weight_bytes + (0 if part in frozen else OPTIMIZER_BYTES))
        for part, count in num_parameters(architecture).items()
    )


def never_trained(freezes: Iterable[Sequence[str]]) -> set[str]:
    """Parts of which the optimizer may keep nothing, so that a run is never refused for what it does not need.

    Args:
        freezes: of each stage of the run, the patterns of what is frozen (`--model.freeze`). One that names a piece
            of a part, or of any, counts for all of it.
    """
    stages = [
        {part for part in MODULES if any(name.startswith(part) or not name.startswith(MODULES) for name in patterns)}
        for patterns in freezes
    ]
    return set.intersection(*stages)


def most_at_once(config: CheckpointConfig, steps: int) -> int:
    """Checkpoints of a run that are on the disk together at worst, the one being written among them."""
    held: list[int] = []
    most = 0
    for step in [*range(config.save_interval, steps, config.save_interval), steps]:
        held.append(step)
        most = max(most, len(held))
        # At worst the best are none of those that stay anyway.
        best = sorted(held, key=lambda step: config.keep_every > 0 and step % config.keep_every == 0)
        held = kept(held, config.keep_last, config.keep_every, config.keep_best, best)
    return most


def check_disk(config: CheckpointConfig, steps: int, size: int) -> None:
    """Refuse a run whose checkpoints its disk cannot hold.

    What the run's folder holds already counts as room, but for what is set aside.

    Args:
        steps: of the whole run.
        size: `checkpoint_bytes` of one.
    Raises:
        ValueError: names what is needed, what is free and the folder.
    """
    run = Path(config.save).absolute()
    place = next(folder for folder in (run, *run.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    own = [path for path in run.glob("*") if path.name.startswith(("step_", INCOMPLETE))]
    held = sum(path.stat().st_size for folder in own for path in folder.rglob("*") if path.is_file())
    count = most_at_once(config, steps)
    if count * size > free + held:
        own_room = f" and the run's own take {_gigabytes(held)}" if held else ""
        raise ValueError(
            f"--checkpoint.save {config.save} has too little room: {count} checkpoints of {_gigabytes(size)} at once "
            f"need {_gigabytes(count * size)}, but {_gigabytes(free)} are free there{own_room}: free some, choose "
            "another folder, keep fewer (--checkpoint.keep-last, keep-every, keep-best) or freeze more "
            "(--model.freeze)"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
