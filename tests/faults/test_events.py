"""A save that is killed, or whose disk fails, at its calls on files: events.py, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import disk


def test_in_a_process_whose_disk_fails(tmp_path: Path, capsys: Any) -> None:
    library = disk.build(tmp_path)
    if not library:
        pytest.skip("no C compiler: kills and failures at each call on a file are not tried")
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("events.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
