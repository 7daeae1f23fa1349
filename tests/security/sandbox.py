"""Opening a hostile file where it cannot hurt: in a process of its own, whose memory is bounded and looked at after."""

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARKER = "marker"  # what a file's code would leave
MOST_GROWTH = 1 << 30  # bytes that any file may take


def opened(folder: Path, action: Callable[[], Any], *, most: int = MOST_GROWTH) -> str:
    """Let a fork do `action` in `folder`.

    Returns:
        What it raised, as `ValueError: text`, or else `done: ` and what it returned.
    Raises:
        AssertionError: it ran the file's code, wrote anywhere in the folder or its parent, took more memory than a
            file may, was killed, or did not end in a minute.
    """
    before = _tree(folder.parent)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            os.write(writing, json.dumps(_watched(folder, action)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0 and told, f"killed by signal {status}"
    outcome, growth = json.loads(told)
    written = {name for name, _ in _tree(folder.parent) ^ before}
    assert not written, f"wrote {sorted(written)}"
    assert growth <= most, f"took {growth >> 20} MB: {outcome}"
    return str(outcome)


def _watched(folder: Path, action: Callable[[], Any]) -> tuple[str, int]:
    signal.alarm(60)
    gc.freeze()  # else a look at all that is there copies it from the parent
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # as for whoever starts a script there
    limit = _status("VmSize") + 3 * MOST_GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # so that a mistake does not take the machine along
    start = _status("VmHWM")  # a fork's own begins with what it holds
    try:
        outcome = f"done: {action()}"
    except BaseException as error:  # what it raises is looked at by the test
        outcome = f"{type(error).__name__}: {error}"
    return outcome[: 1 << 16], _status("VmHWM") - start


def _status(name: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _tree(folder: Path) -> set[tuple[str, Any]]:
    found = set()
    for path in folder.rglob("*"):
        entry = path.lstat()
        found.add((str(path), (entry.st_mode, entry.st_size, entry.st_mtime_ns)))
    return found
