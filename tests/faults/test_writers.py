"""A save that cannot succeed ends on all ranks, soon, with an error; the checkpoint before it is as it was."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from mmcore import checkpoint, distributed
from mmcore import checkpoint_files as files
from mmcore.checkpoint_shards import Shards
from mmcore.config import ParallelConfig
from tests import ranks
from tests.training.test_saving import Run, names

PAIR = ParallelConfig(tensor_model_parallel_size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "words").write_text("one two")
    return tmp_path


@contextmanager
def killed_thread(owner: Any, name: str) -> Iterator[list[str]]:
    """The first thread that calls a function is ended there, by what nothing catches; its name is noted."""
    killed: list[str] = []

    def end(*args: Any) -> Any:
        if killed:
            return real(*args)
        killed.append(threading.current_thread().name)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(SystemExit))
        while True:
            time.sleep(0)

    real = getattr(owner, name)
    with mock.patch.object(owner, name, end):
        yield killed


def test_each_writer_killed(folder: Path) -> None:
    """The thread that writes a rank's files, one of those that each write one, and the one that waits for them."""

    def save() -> list[tuple[list[str], str]]:
        found = []
        for async_save in (False, True):
            run = Run(PAIR, folder, async_save=async_save)
            run.save(1).finish()
            for victim in (0, 1):
                for owner, name in (
                    (Shards, "write"),
                    (FileSystemWriterAsync, "write_preloaded_data"),
                    (files, "checksum"),
                ):
                    is_victim = victim == int(os.environ["RANK"])
                    with killed_thread(*((owner, name) if is_victim else (time, "ctime"))) as killed:
                        with pytest.raises(checkpoint.SaveError) as raised:
                            run.save(2).finish()
                        found.append((killed, str(raised.value)))
                    assert not distributed.is_main() or names(folder) == ["step_00000001"]
        return found

    results = ranks.run(save, PAIR, 2)
    assert len(results[0]) == 12
    for index, ((killed, told), (other_killed, other_told)) in enumerate(zip(*results, strict=True)):
        assert told == other_told and f"rank {index // 3 % 2}: its writer was ended" in told
        (thread,) = killed or other_killed
        assert thread.startswith(("saving step_00000002", "ThreadPoolExecutor"))
    assert files.verify(folder / "step_00000001") == []
