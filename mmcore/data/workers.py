"""A loader's worker processes: a signal to the whole job, by which its ranks save and end, does not end them.

Slurm, torchrun and a terminal signal all processes of a job. Without its workers a rank could not finish its step, and
torch ends a worker by any SIGTERM that is not its parent's (torch 2.11, torch/csrc/DataLoader.cpp).
"""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


def start_workers(reader: IterableDataset[Any], num_workers: int) -> Iterator[Any]:
    """Read in that many processes, which take turns; in this one for 0.

    They are forked, so that they share the tokenizer and the dataset's index; torch gives each one thread.
    """
    loader = DataLoader(
        reader,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_heed_parent_alone,
        generator=torch.Generator(),  # a seed for workers is drawn: not from what a checkpoint keeps
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # what is blocked here is blocked in them from birth
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_workers(iterator: Any) -> None:
    """End those of an iterator of `start_workers`; one that does not end by itself is killed."""
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()


def _heed_parent_alone(_worker: int) -> None:
    """Of the signals that are blocked, SIGTERM from the parent counts: so it ends its workers when it ends itself."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
