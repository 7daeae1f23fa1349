"""What is deleted is never the newest checkpoint that is whole, and nothing is left that nobody deletes."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmcore import checkpoint_files as files
from mmcore.config import CheckpointConfig
from tests.test_checkpoint_files import events, flip, write

RESTARTS = 100


def restarts(run: Path) -> str:
    """Start a run again and again, each time killed somewhere between its start and the last deletion after its save;
    now and then its newest checkpoint is damaged."""
    draw = random.Random(5)
    torn = damaged = newest = 0

    def life() -> None:
        files.clear_incomplete(run)
        for folder in reversed(files.step_folders(run)):
            if not files.verify(folder):
                break
            files.set_aside(folder)
        found = files.step_folders(run)
        step = int(found[-1].name[5:]) + 1 if found else 1
        folder = run / f"{files.INCOMPLETE}step"
        folder.mkdir()
        (folder / "weights.distcp").write_bytes(bytes([step]) * 5000)
        (folder / "run.json").write_text("{}")
        files.write_manifest(folder, {})
        files.publish(folder, files.step_folder(run, step))
        files.prune(run, CheckpointConfig(keep_last=2))

    for _ in range(RESTARTS):
        torn += not events(life, draw.randrange(1, 40))
        whole = [int(folder.name[5:]) for folder in files.step_folders(run) if not files.verify(folder)]
        assert max(whole, default=0) >= newest, f"step {newest} was whole, and is gone"
        newest = max(whole, default=0)
        if len(whole) > 1 and draw.random() < 0.5:
            flip(files.step_folder(run, newest) / "weights.distcp")
            newest, damaged = whole[-2], damaged + 1
    assert events(life, 0)
    left = {path.name for path in run.iterdir()}
    kept = {folder.name for folder in files.step_folders(run)}
    assert len(kept) == 2 and left - kept == {name for name in left if name.startswith(files.DAMAGED)}, left
    assert torn > RESTARTS / 3 and newest > 5, (torn, newest)
    return f"{RESTARTS} restarts, {torn} of them killed, {damaged} newest ones damaged"


def test_a_hundred_restarts(tmp_path: Path, tell: Any) -> None:
    """In a process without torch, of which a fork costs nothing."""
    code = f"from tests.faults.test_retention import *; print(restarts(Path({str(tmp_path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tell("retention is safe", f"{done.stdout.strip()}: the newest whole one was always there, no orphan")


def test_what_is_not_whole_takes_no_place(tmp_path: Path) -> None:
    """A folder of a later step without a manifest, such as a copy that is on its way, is no reason to delete one."""
    for step in (10, 20):
        write(tmp_path, step)
    (write(tmp_path, 90) / files.MANIFEST_FILE).unlink()
    files.prune(tmp_path, CheckpointConfig(save_interval=10, keep_last=1))
    assert [folder.name for folder in files.step_folders(tmp_path)] == ["step_00000020", "step_00000090"]
