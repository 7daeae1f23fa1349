"""One job at a time writes a run's folder: a killed torchrun can leave ranks behind that still do. No torch."""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = "lock"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the folder; the system lets go of it when the process ends, however it ends.

    The lock is a record lock (POSIX): it belongs to the process alone, so that a loader's worker which outlives it
    does not keep it, and on NFS and Lustre (mounted with `flock`) it holds between machines. Where a file system has
    no locks, that is said and the run goes on.

    Raises:
        ValueError: another job holds it, or the folder cannot be written.
    """
    path = run / LOCK_FILE
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")  # what another job wrote there stays until it is known to be gone
    except OSError as error:
        raise ValueError(f"--checkpoint.save {run} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of the two depends on the system
            raise ValueError(f"{run} is being written by {_holder(path)}") from None
        except OSError as error:
            print(f"{run} cannot be locked ({error.strerror}): see to it that no other job writes it", file=sys.stderr)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        file.flush()
        yield


def _holder(path: Path) -> str:
    """Who holds a lock, and what to do about it."""
    try:
        content = json.loads(path.read_text())
        host, pid = content["host"], int(content["pid"])
    except (OSError, ValueError, KeyError, TypeError):  # it has not written it yet
        return "another job: wait for it, end it, or choose another --checkpoint.save"
    return (
        f"another job, process {pid} on {host}: wait for it, end it (`kill {pid}` there; a killed torchrun leaves its "
        "ranks behind), or choose another --checkpoint.save"
    )
