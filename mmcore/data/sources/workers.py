"""A function over a list, in several processes, the results in the list's order."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 16  # items that travel together
CHUNKS_AHEAD = 3  # for each worker, so that none waits and memory stays bounded

_function: Callable[[Any], Any]  # of a worker: sent once, because an index of an archive is large


def map_in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """`map`, in this process when there is one worker or too little to share.

    Args:
        function: can be pickled.
    Raises:
        concurrent.futures.BrokenExecutor: a worker was killed.
    """
    workers = min(workers, -(-len(items) // CHUNK))
    return map(function, items) if workers <= 1 else _in_processes(function, items, workers)


def _in_processes(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    chunks = (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))
    # Not forked: this process may have threads, a progress bar's for one.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (function,))
    pending: deque[Future[list[Result]]] = deque()
    others = set(multiprocessing.active_children())
    try:
        # Ctrl-C reaches all of them, and the parent ends the others, which ignore it from their first moment on.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for chunk in itertools.islice(chunks, workers * CHUNKS_AHEAD):
                pending.append(pool.submit(_run, chunk))
        finally:
            signal.signal(signal.SIGINT, handler)
        while pending:
            done = pending.popleft().result()
            pending.extend(pool.submit(_run, chunk) for chunk in itertools.islice(chunks, 1))
            yield from done
    except BaseException:  # nobody wants what they are at, or still loading for
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(chunk: Sequence[Any]) -> list[Any]:
    return [_function(item) for item in chunk]
