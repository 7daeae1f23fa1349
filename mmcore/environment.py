"""What a process and its libraries read in the environment: which rank it is, and how CUDA is to queue. No torch."""

import os
import re

from mmcore.config import ParallelConfig

# Rendezvous port of a Slurm job: one of these many, by its number, from the first on.
_FIRST_PORT, _NUM_PORTS = 20000, 10000


def name_rank() -> None:
    """Give a task that `srun` started the variables that torchrun sets: here and in torch they say which rank it is.

    Where RANK is set already nothing is changed, so torchrun works in a Slurm job too. A batch script has SLURM_PROCID
    as well, but SLURM_STEP_NUM_TASKS only a task has (Slurm 22.05.8, seen).
    """
    slurm = os.environ
    if "RANK" in slurm or "SLURM_STEP_NUM_TASKS" not in slurm:
        return
    world_size = int(slurm["SLURM_STEP_NUM_TASKS"])
    tasks = _tasks_of_nodes(slurm["SLURM_STEP_TASKS_PER_NODE"])
    names = {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[int(slurm["SLURM_NODEID"])]),
    }
    if world_size > 1:
        os.environ.setdefault("MASTER_ADDR", _first_node(slurm["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + int(slurm["SLURM_JOB_ID"]) % _NUM_PORTS))
    os.environ.update(names)


def queue_in_order(parallel: ParallelConfig) -> None:
    """Let a GPU begin work in the order in which it is queued, where layers or sequences are shared among ranks.

    Megatron-core queues a transfer before the product that is to hide it, and has no other means to let it begin first
    (core_v0.16.1, megatron/core/tensor_parallel/layers.py). CUDA reads the variable when it starts, so this comes
    before torch is imported. What the user has set counts.
    """
    if max(parallel.tensor_model_parallel_size, parallel.context_parallel_size) > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _tasks_of_nodes(text: str) -> list[int]:
    """Of "8(x2),4", as Slurm writes tasks by node: 8, 8, 4."""
    counts = []
    for part in text.split(","):
        tasks, _, nodes = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(nodes or 1)
    return counts


def _first_node(nodes: str) -> str:
    """The first name of a list such as "gpu[07-09,12],cpu1": gpu07."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]
