"""Real gloo processes for tests: fork once everything is imported, so that a rank costs no start-up."""

import gc
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  (every optimizer imports it: here once, not in each rank)

from mmcore import distributed  # (imports megatron-core before any fork)
from mmcore.config import ParallelConfig


def run(
    function: Callable[..., Any], layout: ParallelConfig, world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """Run `function(*args)` on every rank of a layout, megatron-core's groups up.

    Returns:
        What each rank returned, by rank.
    Raises:
        AssertionError: a rank failed (its traceback is the message) or the time ran out.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, world_size, port, Path(folder), function, layout, args) for rank in range(world_size)]
        deadline, failed = time.monotonic() + timeout, False
        waiting = set(children)
        while waiting and not failed and time.monotonic() < deadline:
            for child in list(waiting):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    waiting.discard(child)
                    failed |= status != 0
            time.sleep(0.01)
        for child in waiting:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert not errors, "\n".join(errors)
        assert not waiting and not failed, f"ranks still running after {timeout} s, or killed"
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _fork(rank: int, world_size: int, port: int, folder: Path, function: Any, layout: ParallelConfig, args: Any) -> int:
    if child := os.fork():
        return child
    gc.freeze()  # what earlier tests have left is not cleared away here, in the middle of whatever this one is at
    status = 1
    try:
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
        )
        distributed.initialize(layout, seed=1)
        result = function(*args)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
        distributed.shutdown()
        status = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        os._exit(status)
