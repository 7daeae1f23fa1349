"""A Slurm of two nodes on this machine, for as long as these tests run."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
LAUNCHERS = ROOT / "examples" / "llava_mistral_clip"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """Its commands."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: object) -> str:
        words = [str(word) for word in command]
        return subprocess.run(
            words, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    def submit(
        self,
        launcher: str,
        settings: dict[str, str],
        options: tuple[object, ...] = (),
        sbatch: tuple[object, ...] = (),
    ) -> int:
        """A job of the real sbatch file: one rank on each of the two nodes, as far as `sbatch` says nothing else."""
        small = ("-N2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1")
        log = f"--output={self.folder}/%j.log"
        words = map(str, ["sbatch", "--parsable", *small, log, *sbatch, LAUNCHERS / launcher, *options])
        done = subprocess.run(
            list(words), env={**self.environment, **settings}, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def state(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says of it, by name."""
        words = self.call("scontrol", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def log(self, job: int) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, job: int, seconds: float = 600) -> dict[str, str]:
        """Until it has ended for good."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"{state}\n{self.log(job)}"
            time.sleep(0.3)
        return state

    def cancel_all(self) -> None:
        for job in self.call("squeue", "--noheader", "--format", "%A").split():
            self.call("scancel", job)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: Any) -> Iterator[Slurm]:
    if not os.environ.get("SLURM_TESTS"):
        pytest.skip("a Slurm is started where it is asked for: SLURM_TESTS=1 bash tests/run.sh tests/slurm")
    if any(shutil.which(name, path=SBIN) is None for name in ("slurmctld", "slurmd", "munged")):
        pytest.skip("Slurm is not installed: `bash tests/slurm/cluster.sh install` (Debian, Ubuntu) does it")
    if os.geteuid():
        pytest.skip("Slurm's daemons want root here")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", str(CLUSTER), "start", str(folder)], check=True, timeout=60)
    try:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        # The nodes' names lead nowhere.
        yield Slurm(
            folder=folder,
            environment={**inherited, "SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"},
        )
    finally:
        subprocess.run(["bash", str(CLUSTER), "stop", str(folder)], check=True, timeout=60)
