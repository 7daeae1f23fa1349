"""A loader's worker processes: a signal to the whole job, by which its ranks save and end, does not end them.

Slurm, torchrun and a terminal signal all processes of a job. Without its workers a rank could not finish its step, and
torch ends a worker by any SIGTERM that is not its parent's (torch 2.11, torch/csrc/DataLoader.cpp).
"""

import contextlib
import faulthandler
import mmap
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
_SLOT = 512


@dataclass(slots=True, kw_only=True)
class _Group:
    """Workers of one loader, as the process that reads from them sees them."""

    pids: list[int]
    board: mmap.mmap
    """Shared with them: what each reads, a slot each."""
    stacks: IO[bytes]
    """Where they write their Python stacks, on SIGUSR2."""


_groups: dict[int, _Group] = {}
_board: mmap.mmap | bytearray = bytearray(_SLOT)
_slot = 0


def start_workers(reader: IterableDataset[Any], num_workers: int) -> Iterator[Any]:
    """Read in that many processes, which take turns; in this one for 0.

    They are forked, so that they share the tokenizer and the dataset's index; torch gives each one thread.
    """
    generator = torch.Generator()  # a seed for workers is drawn: not from what a checkpoint keeps
    if not num_workers:
        return iter(DataLoader(reader, batch_size=None, generator=generator))
    board, stacks = mmap.mmap(-1, _SLOT * num_workers), tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    loader = DataLoader(
        reader,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork",
        worker_init_fn=partial(_begin, board, stacks),
        generator=generator,
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # what is blocked here is blocked in them from birth
    try:
        iterator: Any = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pids = [worker.pid for worker in iterator._workers]
    _groups[id(iterator)] = _Group(pids=pids, board=board, stacks=stacks)
    return iterator


def stop_workers(iterator: Any) -> None:
    """End those of an iterator of `start_workers`; one that does not end by itself is killed."""
    _groups.pop(id(iterator), None)
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()


def reading(sample: str) -> None:
    """Say which sample this process is at, for who asks what hangs; "" for none."""
    _board[_slot : _slot + _SLOT] = sample.encode()[:_SLOT].ljust(_SLOT, b"\0")


def readings() -> list[str]:
    """Which samples this process and its workers are at."""
    slots = [("this process", bytes(_board[:_SLOT]))]
    for group in _groups.values():
        slots += [(f"worker {at}", group.board[at * _SLOT :][:_SLOT]) for at in range(len(group.pids))]
    texts = [(who, text.rstrip(b"\0").decode(errors="replace")) for who, text in slots]
    return [f"{who} reads {text}" for who, text in texts if text]


def worker_stacks() -> str:
    """Python stacks of all workers, also of those that hang in a library."""
    told = ""
    for group in _groups.values():
        for pid in group.pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGUSR2)
        time.sleep(0.5)
        told += os.pread(group.stacks.fileno(), 1 << 20, 0).decode(errors="replace")
    return told and f"loader workers\n{told}"


def _begin(board: mmap.mmap, stacks: IO[bytes], worker: int) -> None:
    """In a worker. Of the signals that are blocked, SIGTERM from the parent counts: so it ends its workers with it."""
    global _board, _slot
    _board, _slot = board, worker * _SLOT
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
