"""Ranks by Slurm's variables, as srun of Slurm 22.05.8 set them; what CUDA is told for a layout."""

import os
import subprocess
import sys

import pytest
import torch

from mmcore import host
from mmcore.commands import train
from mmcore.config import ParallelConfig
from mmcore.distributed import Rank
from mmcore.environment import name_rank, queue_in_order

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Task 17 of a job on two nodes of eight GPUs and one of four; the batch script of such a job.
TASK = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "20",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "rack1-gpu[07-08,12]",
}
BATCH = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "20"}


def named(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> dict[str, str]:
    """What is set once a process with these variables has found out its rank."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(variables))
        name_rank()
        return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_a_task_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dict(zip(NAMES, ("17", "20", "1", "4", "rack1-gpu07", "24567"), strict=True))
    assert named(monkeypatch, TASK) == expected
    assert named(monkeypatch, {**TASK, "SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "8"
    for nodes, first in (("n1", "n1"), ("a[1-2]b[3-4]", "a1b3"), ("cpu1,gpu[2-3]", "cpu1"), ("n[9,11]", "n9")):
        assert named(monkeypatch, {**TASK, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_what_is_told_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the meeting place; ranks are Slurm's, unless torchrun has dealt them."""
    told = named(monkeypatch, {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "3"})
    assert (told["MASTER_ADDR"], told["MASTER_PORT"], told["WORLD_SIZE"]) == ("10.0.0.1", "1", "20")
    by_torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    assert named(monkeypatch, {**TASK, **by_torchrun}) == by_torchrun


def test_who_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop, a batch script, and a shell in a step of one task: no rendezvous."""
    assert named(monkeypatch, {}) == named(monkeypatch, BATCH) == {}
    shell = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    alone = dict(zip(NAMES[:4], ("0", "1", "0", "1"), strict=True))
    assert named(monkeypatch, {**TASK, **shell, "SLURM_STEP_TASKS_PER_NODE": "1"}) == alone


def test_the_command_line_does_it() -> None:
    """Before anything asks for a rank; those that leave a mistake to the first one do not die of a SIGTERM."""
    code = (
        "import os, sys, time, signal; time.sleep = lambda _: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from mmcore.__main__ import main; sys.argv[1:] = ['train', 'nothing']; sys.exit(main())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, **TASK}, capture_output=True, timeout=60)
    assert done.returncode == 2 and not done.stderr, done.stderr


def test_a_rank_that_has_ended_keeps_its_exit_code() -> None:
    """Though SIGTERM comes when Python has taken itself down, and with it the handlers it had installed.

    By C's on_exit, which hands the exit code on: to `raise`, of signal 15, which is SIGTERM.
    """
    code = (
        "import ctypes, signal, sys, types\n"
        "libc = ctypes.CDLL(None); libc.on_exit(getattr(libc, 'raise'), None)\n"
        "def verb(argv): signal.signal(signal.SIGTERM, lambda *_: None); return 15\n"
        "sys.modules['mmcore.commands.train'] = types.SimpleNamespace(main=verb)\n"
        "from mmcore.__main__ import main; sys.argv[1:] = ['train']; sys.exit(main())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    for variables, expected in ((TASK, 15), ({}, -15)):
        done = subprocess.run([sys.executable, "-c", code], env={**environment, **variables}, timeout=60)
        assert done.returncode == expected


def test_rank_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    for name in NAMES:  # so that they are gone again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    name_rank()
    assert Rank.from_environment() == Rank(rank=17, local_rank=1, world_size=20)


@pytest.mark.parametrize(
    ("layout", "set_before", "expected"),
    [
        ({}, None, None),
        ({"pipeline_model_parallel_size": 4}, None, None),
        ({"tensor_model_parallel_size": 2}, None, "1"),
        ({"context_parallel_size": 2}, None, "1"),
        ({"tensor_model_parallel_size": 2}, "8", "8"),
    ],
)
def test_queues(
    layout: dict[str, int], set_before: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setattr(os, "environ", {name: set_before} if set_before else {})
    queue_in_order(ParallelConfig(**layout))
    assert os.environ.get(name) == expected


def test_training_sets_it_from_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch is there: with what checks the run."""

    def seen(*_: object) -> None:
        raise ValueError(f"CUDA_DEVICE_MAX_CONNECTIONS={os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS')}")

    monkeypatch.setattr(train, "check", seen)
    for recipe, expected in (("mistral_clip_sft", "1"), ("llava15_vicuna_pretrain", None)):
        monkeypatch.setattr(os, "environ", {})
        with pytest.raises(ValueError, match=f"={expected}$"):
            train.main([recipe])


@pytest.mark.parametrize(
    ("visible", "on_node", "ranks", "backend"),
    [(8, None, 8, "nccl"), (1, None, 2, "gloo"), (1, "8", 8, "nccl"), (8, "8", 8, "nccl"), (1, "1", 2, "gloo")],
)
def test_ranks_that_see_one_gpu_each_use_nccl(
    visible: int, on_node: str | None, ranks: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(os, "environ", {"SLURM_GPUS_ON_NODE": on_node} if on_node else {})
    assert host.communication_backend(ranks) == backend
    monkeypatch.setattr(host, "has_cuda", lambda: False)
    assert host.communication_backend(ranks) == "gloo"
