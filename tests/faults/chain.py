"""A run that is killed and started again, over and over, and looked at in between."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmcore import checkpoint_files as files
from tests.faults.jobs import Job, arguments

STEPS, RANKS = 12, 2
LAST = STEPS - 4  # begun again after this step, for it would soon be done
# What is not the same in two runs: these name the run's folder and settings.
OWN = {"run.json", ".metadata", files.MANIFEST_FILE}


def sums(folder: Path) -> dict[str, Any]:
    """Bytes and CRC-32 of each file that holds the state, as it was written: the same in every run of its kind."""
    content = json.loads((folder / files.MANIFEST_FILE).read_text())
    return {name: entry for name, entry in content.items() if name not in OWN}


def log(run: Path) -> list[dict[str, Any]]:
    """What a run has logged of its steps, times left out."""
    rows = [
        json.loads(line) for line in (run / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")
    ]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "lr", "num_tokens", "num_samples")} for row in rows]


class Chain:
    """The lives of one run, of which nothing that was published is ever lost or changed."""

    def __init__(self, inputs: Path, folder: Path, whole: Path, *, async_save: bool) -> None:
        """
        Args:
            whole: the folder of the same run, which nobody has killed and which has kept all checkpoints.
        """
        self.folder, self.run, self.async_save = folder, folder / "run", async_save
        options = ["--checkpoint.keep-last", 1, *(["--checkpoint.async-save"] if async_save else [])]
        self.given = arguments(inputs, self.run, STEPS, *options)
        self.sums = {int(path.name[5:]): sums(path) for path in files.step_folders(whole)}
        self.log, self.left = log(whole), {path.name for path in whole.iterdir() if path.is_file()}
        self.lives = self.newest = self.lost = self.torn = 0

    def life(self, live: Callable[[Job], object], before: Callable[[int], object] | None = None) -> Job:
        """Start the run, let it live until it is dead, and look at what it leaves."""
        if self.newest > LAST:
            shutil.rmtree(self.run)
            self.newest = 0
        job = Job(self.given, RANKS, self.folder / "notes", before)
        try:
            live(job)
        finally:
            job.kill()
        self.lives += 1
        self._look(job)
        return job

    def live_on(self, steps: int, before: Callable[[int], object] | None = None) -> None:
        """Start the run, and kill it when it has published checkpoints of so many steps more."""
        end = files.step_folder(self.run, (self.newest if self.newest <= LAST else 0) + steps)

        def live(job: Job) -> None:
            while not end.exists():
                assert not job.look(), job.said()
                time.sleep(0.005)

        self.life(live, before)

    def finish(self) -> None:
        """Let it come to its end: it is the run that nobody killed, and has left nothing else."""
        job = Job(self.given, RANKS, self.folder / "notes")
        assert job.wait() == dict.fromkeys(range(RANKS), 0), job.said()
        self.newest = STEPS
        assert log(self.run) == self.log
        found = {path.name for path in self.run.iterdir()}
        assert found == {*self.left, f"step_{STEPS:08d}"}, found
        assert sums(self.run / f"step_{STEPS:08d}") == self.sums[STEPS]

    def _look(self, job: Job) -> None:
        if self.newest and "from" in job.said():
            assert f"going on from {files.step_folder(self.run, self.newest)}" in job.said(), job.said()
        found = {int(path.name[5:]): path for path in files.step_folders(self.run)}
        newest = max(found, default=0)
        assert newest >= self.newest, f"step {self.newest} was published and is gone; there are {sorted(found)}"
        for step, path in found.items():
            assert (path / files.MANIFEST_FILE).is_file() and not files.verify(path), path
            assert sums(path) == self.sums[step], path
        logged = len(log(self.run)) if (self.run / "log.jsonl").exists() else 0
        self.newest, self.lost = newest, max(self.lost, logged - newest)
        # What is saved behind the training's back may be one interval older.
        assert logged - newest <= 1 + self.async_save, f"{logged} steps were done, and step {newest} is the newest"
        leftovers = [path.name for path in self.run.glob(".*")]
        self.torn += any(files.INCOMPLETE in name for name in leftovers)
        assert len(leftovers) <= 2, leftovers
