"""`mmcore train` under the real sft.sbatch on two nodes: preempted, killed, out of time, out of disk, it ends as if
nothing had happened, bit for bit.

    SLURM_TESTS=1 PREEMPTIONS=20 SLOW_SAVE=40 bash tests/run.sh tests/slurm

is the full form, of 20 preemptions with no loader worker and 20 with four. The short one has one with none, and with
four the one before a time limit; saves of 3 s.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import Slurm
from tests.training.test_run import inputs as inputs  # a fixture
from tests.training.test_run import log

PREEMPTIONS = int(os.environ.get("PREEMPTIONS", 1))
SLOW_SAVE = os.environ.get("SLOW_SAVE", "3")
SAVED = 4  # steps between checkpoints
STEPS = 12 + 8 * PREEMPTIONS
SLOWLY = Path(__file__).with_name("slowly.py")
KINDS = ("out_of_time", "preempted", *(["preempted_workers"] if PREEMPTIONS > 1 else []), "killed", "full")


class Runs:
    """Jobs of one recipe."""

    def __init__(self, slurm: Slurm, inputs: Path, folder: Path) -> None:
        self.slurm, self.inputs, self.folder = slurm, inputs, folder
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {SLOWLY} "$@"\n')
        self.python.chmod(0o755)

    def submit(self, run: Path, *options: object, sbatch: tuple[object, ...] = (), **settings: str) -> int:
        own = {"CHECKPOINT": f"{self.inputs}/model", "DATA": f"{self.inputs}/data", "RUN": str(run), "TP": "2"}
        own |= {"RECIPE": "quickstart_sft", "PYTHON": str(self.python), "STEP_SECONDS": "0.4 0"}
        small = ["--train.steps", STEPS, "--checkpoint.save-interval", SAVED, "--optimizer.lr-warmup-steps", 2]
        small += ["--train.global-batch-size", 8, "--train.micro-batch-size", 4, "--data.num-streams", 4]
        small += ["--data.seq-length", 128, "--data.packing-buffer-size", 16, "--logging.log-interval", 1]
        return self.slurm.submit(
            "sft.sbatch", {**own, **settings}, (*small, *options), sbatch=("--cpus-per-task=2", *sbatch)
        )

    def steps(self, run: Path) -> int:
        """Done so far, as its log says."""
        return (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").exists() else 0

    def wait_for_step(self, job: int, run: Path, step: int) -> None:
        deadline = time.monotonic() + 600  # others are first
        while self.steps(run) < step:
            state = self.slurm.state(job)["JobState"]
            assert time.monotonic() < deadline and state in ("PENDING", "RUNNING", "COMPLETING"), self.slurm.log(job)
            time.sleep(0.1)

    def finish(self, job: int, run: Path, restarts: int, seconds: float = 600) -> str:
        """Wait for its end, which has to be a good one after so many starts; returns the job's log."""
        state = self.slurm.wait(job, seconds)
        said = self.slurm.log(job)
        assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), said
        assert (run / "DONE").exists() and said.endswith("finished\n")
        assert not list(run.glob("*incomplete*")) and not list(run.glob("damaged*"))
        return said

    def whole(self) -> Path:
        run = self.folder / "whole"
        self.finish(self.submit(run, STEP_SECONDS="0"), run, restarts=0)
        return run

    def scored(self) -> Path:
        """What the model that comes of it answers, on two replicas, and the score of that."""
        output = self.folder / "scored"
        settings = {"CHECKPOINT": f"{self.inputs}/model", "TASK": "exact-match", "DATA": f"{self.inputs}/rows.json"}
        settings |= {"IMAGES": f"{self.inputs}/images", "OUTPUT": str(output), "PYTHON": str(self.python)}
        job = self.slurm.submit("evaluate.sbatch", settings, ("--max-new-tokens", 2), sbatch=("--cpus-per-task=2",))
        state = self.slurm.wait(job)
        assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), self.slurm.log(job)
        return output

    def preempted_workers(self) -> Path:
        """Which get the signals, too."""
        return self.preempted(workers=4)

    def preempted(self, workers: int = 0) -> Path:
        """By whoever wants the nodes, in the middle of everything, again and again."""
        run = self.folder / f"preempted-{workers}"
        options = ("--data.num-workers", workers, "--checkpoint.save-interval", STEPS)
        job = self.submit(run, *options, STEP_SECONDS="0.4", SAVE_SECONDS=SLOW_SAVE)
        for cycle in range(PREEMPTIONS):
            self.wait_for_step(job, run, self.steps(run) + 2 + cycle % 3)
            self.slurm.call("scancel", "--batch", "--signal=USR1", job)
            deadline = time.monotonic() + 120 + float(SLOW_SAVE)
            while self.slurm.log(job).count("preempted: saved") <= cycle:
                assert time.monotonic() < deadline, self.slurm.log(job)
                time.sleep(0.2)
        said = self.finish(job, run, PREEMPTIONS, 600 + 60 * PREEMPTIONS)
        assert said.count("preempted: saved") == PREEMPTIONS
        return run

    def out_of_time(self) -> Path:
        """By Slurm's own signal two minutes before the limit, which is set when they have begun; then the job is given
        time again."""
        run = self.folder / "limit"
        job = self.submit(run, "--data.num-workers", 4, sbatch=("--time=30", "--signal=B:USR1@120"), STEP_SECONDS="3 0")
        self.wait_for_step(job, run, 2)
        hours, minutes, _ = map(int, self.slurm.state(job)["RunTime"].split(":"))
        self.slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={hours * 60 + minutes + 2}")
        deadline = time.monotonic() + 120
        while "preempted" not in self.slurm.log(job):
            assert time.monotonic() < deadline, self.slurm.log(job)
            time.sleep(0.2)
        self.slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        said = self.finish(job, run, restarts=1)
        assert "USR1: to all ranks as SIGTERM" in said and "preempted: saved" in said
        return run

    def killed(self) -> Path:
        run = self.folder / "killed"
        job = self.submit(run)
        self.wait_for_step(job, run, SAVED + 2)
        process, begun = rank_process(job, 1), time.monotonic()
        os.kill(process, signal.SIGKILL)
        while "retry 1 of 3" not in self.slurm.log(job):
            assert time.monotonic() < begun + 30, "it took too long for the job to end"
            time.sleep(0.1)
        said = self.finish(job, run, restarts=1)
        assert f"at {SAVED}: retry 1 of 3 without progress" in said
        return run

    def full(self) -> Path:
        """A disk that fills up while it trains; then there is room again."""
        run = self.folder / "full"
        run.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(run)], check=True, capture_output=True)
        try:
            job = self.submit(run)
            self.wait_for_step(job, run, SAVED + 1)
            with (run / "somebody's.tar").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 12))
                except OSError:
                    pass
            state = self.slurm.wait(job)
            assert state["JobState"] == "FAILED", self.slurm.log(job)
            assert [path.name for path in run.glob("step_*")] == [f"step_{SAVED:08d}"], "what is saved stays"
            (run / "somebody's.tar").unlink()
            self.finish(self.submit(run), run, restarts=0)
            kept = self.folder / "full-log"
            kept.mkdir()
            (kept / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes())
            return kept
        finally:
            subprocess.run(["umount", "--lazy", str(run)], check=True)


def rank_process(job: int, rank: int) -> int:
    """The process that srun started as this task."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environ.read_bytes().split(b"\0")
            command = environ.with_name("cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        wanted = (b"SLURM_JOB_ID=%d" % job, b"SLURM_PROCID=%d" % rank, b"SLURM_STEP_NUM_TASKS=2")
        if all(variable in variables for variable in wanted) and SLOWLY.name.encode() in command:
            return int(environ.parent.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def results(slurm: Slurm, inputs: Path, tmp_path_factory: Any) -> Iterator[dict[str, Future[Path]]]:
    """All kinds of jobs at once: Slurm starts as many as the nodes hold."""
    runs = Runs(slurm, inputs, tmp_path_factory.mktemp("runs"))
    with ThreadPoolExecutor(len(KINDS) + 2) as pool:
        yield {name: pool.submit(getattr(runs, name)) for name in (*KINDS, "whole", "scored")}
        slurm.cancel_all()  # what is left where a test failed


def test_two_nodes(results: dict[str, Future[Path]]) -> None:
    rows = log(results["whole"].result())
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and rows[-1]["loss"] < rows[0]["loss"]


def test_a_score(results: dict[str, Future[Path]]) -> None:
    output = results["scored"].result()
    assert json.loads((output / "scores.json").read_text())["num_samples"] == 60
    replicas = [path.read_text() for path in (output / "logs").glob("*/rank-*.log")]
    assert len(replicas) == 2 and "60 answers in" in "".join(replicas)


@pytest.mark.parametrize("kind", KINDS)
def test_as_if_nothing_had_happened(kind: str, results: dict[str, Future[Path]]) -> None:
    """Every step's loss and norm, and so the last one's."""
    assert log(results[kind].result()) == log(results["whole"].result())
