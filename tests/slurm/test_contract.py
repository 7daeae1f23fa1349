"""What the sbatch files do about each way in which ranks end, on a real Slurm, with ranks that end as they are told."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import LAUNCHERS, ROOT, Slurm

FAKE = ROOT / "tests" / "examples" / "fake_trainer.py"
# What ranks do at each start; how the job ends; how often it is started; what its log says.
PLANS = {
    "finished": ("step=4 done exit=0", "COMPLETED", "0:0", 1, "finished"),
    "usage": ("exit=2; done", "FAILED", "2:0", 1, "wrong usage"),
    "suspect": ("exit=16; exit=17; done", "FAILED", "17:0", 2, "a step was suspect"),
    "faults": ("exit=1; exit=1; exit=1; exit=1; done", "FAILED", "93:0", 4, "3 retries brought it no further than -1"),
    "killed": ("kill=1 sleep=60; step=4 done exit=0", "COMPLETED", "0:0", 2, "at -1: retry 1 of 3 without progress"),
    # Longer than Slurm would let them, were srun signalled: KillWait is 15 s.
    "preempted": ("signal=18; done exit=0", "COMPLETED", "0:0", 2, "preempted: saved"),
    "early": ("sleep=60; done exit=0", "COMPLETED", "0:0", 2, "ended by the signal, to be gone on with"),
    # Its ranks save what they have, and ask to be gone on with, but who cancels a job is to be rid of it.
    "cancelled": ("signal=1; done exit=0", "CANCELLED", "75:0", 1, "the job was cancelled"),
}


def submit(slurm: Slurm, run: Path, plan: str, *sbatch: str, **settings: str) -> int:
    run.mkdir(exist_ok=True)
    (run / "plan").write_text("\n".join(plan.split("; ")) + "\n")
    own = {"CHECKPOINT": "c", "DATA": "d", "RUN": str(run), "PYTHON": str(FAKE)}
    return slurm.submit("pretrain.sbatch", {**own, **settings}, sbatch=sbatch)


def starts(run: Path, rank: int = 0) -> int:
    return (run / f"starts-{rank}").read_text().count("\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Path:
    return Path(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def jobs(slurm: Slurm, runs: Path) -> dict[str, int]:
    """One for each plan. All at once, since Slurm waits some seconds before each requeue."""
    found = {name: submit(slurm, runs / name, plan) for name, (plan, *_) in PLANS.items()}
    for name, files, signal in (
        ("preempted", "ready", ["--batch", "--signal=USR1"]),
        ("early", "starts", ["--batch", "--signal=USR1"]),
        ("cancelled", "ready", []),
    ):
        deadline = time.monotonic() + 90
        while not all((runs / name / f"{files}-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline, slurm.log(found[name])
            time.sleep(0.05)
        slurm.call("scancel", *signal, found[name])
    return found


@pytest.mark.parametrize("name", PLANS)
def test_jobs_end_as_their_ranks_say(name: str, slurm: Slurm, runs: Path, jobs: dict[str, int]) -> None:
    _, state, code, count, said = PLANS[name]
    found = slurm.wait(jobs[name])
    assert (found["JobState"], found["ExitCode"]) == (state, code), slurm.log(jobs[name])
    assert starts(runs / name) == starts(runs / name, 1) == count
    assert said in slurm.log(jobs[name])
    logs = sorted(path.name for path in (runs / name / "logs" / str(jobs[name])).iterdir())
    assert logs == ["rank-0000.log", "rank-0001.log"]


def test_each_start_adds_to_the_logs(slurm: Slurm, runs: Path, jobs: dict[str, int]) -> None:
    slurm.wait(jobs["faults"])
    rank = (runs / "faults" / "logs" / str(jobs["faults"]) / "rank-0001.log").read_text()
    assert rank.count("fake trainer, rank 1: exit=1") == 4
    assert slurm.log(jobs["faults"]).count("fake trainer, rank 0: exit=1") == 4, "the job's shows its last lines"


def test_what_was_saved_is_there(slurm: Slurm, runs: Path, jobs: dict[str, int]) -> None:
    for name in ("preempted", "cancelled"):
        slurm.wait(jobs[name])
        assert (runs / name / "step_00000001").is_dir()


def test_a_chain_goes_on_without_requeueing(slurm: Slurm, tmp_path: Path) -> None:
    """And ends with a job that no other can mend."""

    def chain(run: Path, plan: str, length: int) -> list[int]:
        found: list[int] = []
        for _ in range(length):
            after = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{found[-1]}"] if found else []
            found.append(submit(slurm, run, plan, *after, REQUEUE="0"))
        return found

    whole = chain(tmp_path / "whole", "exit=75; exit=1; step=4 done exit=0", 3)
    broken, never = chain(tmp_path / "broken", "exit=17; done exit=0", 2)
    assert [slurm.wait(job)["JobState"] for job in whole] == ["COMPLETED"] * 3
    assert starts(tmp_path / "whole") == 3 and (tmp_path / "whole" / "DONE").exists()
    assert slurm.wait(broken)["ExitCode"] == "17:0"
    assert slurm.wait(never)["JobState"] == "CANCELLED" and starts(tmp_path / "broken") == 1


def test_who_cancelled_a_job_is_still_rid_of_it(slurm: Slurm, runs: Path, jobs: dict[str, int]) -> None:
    assert slurm.wait(jobs["cancelled"])["JobState"] == "CANCELLED" and starts(runs / "cancelled") == 1


@pytest.mark.parametrize("launcher", ["pretrain.sbatch", "sft.sbatch", "evaluate.sbatch"])
def test_their_own_requests_are_what_slurm_takes(slurm: Slurm, launcher: str) -> None:
    """Eight GPUs of a node are there, its 64 CPUs are not."""
    fewer = ("--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=1")
    slurm.call("sbatch", "--test-only", *fewer, LAUNCHERS / launcher)
