"""A disk that fails on demand: this process's calls on the files of a run are counted, and one of them fails.

`disk.c` is preloaded, so that every call of the C library that changes a file, and those that read one, are seen:
Python's and torch's alike.
"""

import ctypes
import enum
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("disk.c")


class Kind(enum.IntFlag):
    """What is counted; in the order of `disk.c`."""

    OPEN = 1
    CREATE = 2
    READ = 4
    WRITE = 8
    SYNC = 16
    CLOSE = 32
    NAME = 64
    DELETE = 128
    STATE = 256


# What changes a disk, what can fail on a bad one, and what fails on one without room.
CHANGES = Kind.CREATE | Kind.WRITE | Kind.SYNC | Kind.CLOSE | Kind.NAME | Kind.DELETE | Kind.STATE
ANY = CHANGES | Kind.OPEN | Kind.READ
GROWS = Kind.CREATE | Kind.WRITE | Kind.SYNC


def build(folder: Path) -> Path | None:
    """The library, compiled; None without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        return None
    library = folder / "disk.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return library


def is_preloaded() -> bool:
    return hasattr(ctypes.CDLL(None), "disk_arm")


def arm(run: Path, kinds: Kind, number: int = 0, error: int = 0, *, lasts: bool = False, log: str = "") -> None:
    """Count calls on the folder of a run, and on what is below it, from now on, in this process.

    Args:
        number: of the call that fails, from 1; none for 0.
        error: how, as an errno; 0 kills the process instead, in the middle of it where it writes.
        lasts: whether all later ones fail too.
        log: file that gets a line for each.
    """
    ctypes.CDLL(None).disk_arm(os.fsencode(run), int(kinds), ctypes.c_long(number), error, int(lasts), os.fsencode(log))


def disarm() -> int:
    """Count no more.

    Returns:
        How many were counted.
    """
    counted = ctypes.CDLL(None).disk_disarm
    counted.restype = ctypes.c_long
    return int(counted())
