"""`mmcore train` as ranks that are forked, so that a start costs no imports, and ended as a launcher ends them."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mmcore.commands.train
import mmcore.training.batches
import mmcore.training.loop  # noqa: F401  (imported before any fork)
from mmcore import __main__ as command_line
from mmcore import checkpoint
from mmcore.config import ParallelConfig
from mmcore.models.architecture import Architecture, ProjectorArch
from mmcore.models.presets import compose
from mmcore.training.optimizer import wrap
from tests import ranks, tiny
from tests.data import fabricated


def small(vocab_size: int) -> Architecture:
    """As few bytes as layouts of two ranks a dimension allow: a save is some 400 calls on files."""
    sizes = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 16, "num_attention_heads": 2}
    language = replace(tiny.LANGUAGE, **sizes, kv_channels=8, vocab_size=vocab_size)
    return compose(replace(tiny.VISION, **sizes), language, ProjectorArch(ffn_hidden_size=16))


def write_inputs(root: Path) -> None:
    """A tokenizer, a dataset of 60 samples and a model."""
    fabricated.write_tokenizer(root / "tokenizer")
    fabricated.write_shards(root / "data", 60)

    def write() -> None:
        model = tiny.build(ParallelConfig(), arch=small(300))
        files = {"architecture": model.architecture, "tokenizer": root / "tokenizer", "state": {}, "loader_state": None}
        checkpoint.save_checkpoint(root / "model", 0, model=wrap(model), optimizer=None, keep_last=1, **files)

    ranks.run(write, ParallelConfig(), 1)


def arguments(inputs: Path, run: Path, steps: int, *options: object) -> list[str]:
    """Of `mmcore train`: two micro batches a step, a checkpoint after each."""
    given = ["quickstart_sft", "--model.checkpoint", inputs / "model", "--data.path", inputs / "data"]
    given += ["--checkpoint.save", run, "--checkpoint.save-interval", 1, "--train.steps", steps]
    given += ["--train.global-batch-size", 2, "--train.micro-batch-size", 1, "--optimizer.lr-warmup-steps", 2]
    given += ["--data.seq-length", 64, "--data.packing-buffer-size", 4, "--data.num-streams", 8]
    return list(map(str, [*given, *options]))


class Job:
    """Ranks of one start of a run."""

    def __init__(
        self, given: list[str], world_size: int, notes: Path, before: Callable[[int], object] | None = None
    ) -> None:
        """
        Args:
            given: as `arguments` returns them.
            notes: folder for what the ranks say.
            before: what each rank does first, told its number.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        notes.mkdir(exist_ok=True)
        self.notes, self.started = notes, time.monotonic()
        self.ended: dict[int, int] = {}
        """Exit code of each rank that has ended, by rank; of one that a signal ended its negative number."""
        self.seconds: dict[int, float] = {}
        """When it ended."""
        self.pids = [self._fork(rank, world_size, port, given, before) for rank in range(world_size)]

    def _fork(
        self, rank: int, world_size: int, port: int, given: list[str], before: Callable[[int], object] | None
    ) -> int:
        if child := os.fork():
            return child
        status = 1
        try:
            sys.stdout = sys.stderr = (self.notes / f"rank-{rank}.txt").open("w", buffering=1)
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size}
            os.environ.update({k: str(v) for k, v in {**address, "RANK": rank, "LOCAL_RANK": rank}.items()})
            sys.argv = ["mmcore", "train", *given]
            if before:
                before(rank)
            status = command_line.main()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def said(self, rank: int = 0) -> str:
        path = self.notes / f"rank-{rank}.txt"
        return path.read_text() if path.exists() else ""

    def look(self) -> bool:
        """Whether all ranks have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.ended[rank] = os.waitstatus_to_exitcode(status)
                    self.seconds[rank] = time.monotonic()
        return len(self.ended) == len(self.pids)

    def kill(self, victim: int | None = None) -> None:
        """The ranks that are still there, as by a machine that fails or by a launcher; before the others a victim."""
        for rank, pid in sorted(enumerate(self.pids), key=lambda one: one[0] != victim):
            if rank not in self.ended:
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.01 if rank == victim else 0)
        while not self.look():
            time.sleep(0.001)

    def wait(self, timeout: float = 120, patience: float = 60) -> dict[int, int]:
        """Until all have ended: `patience` seconds after the first failure, or `timeout` in all, the rest is killed.

        Returns:
            Exit codes by rank.
        """
        failed = 0.0
        while not self.look():
            now = time.monotonic()
            if not failed and any(self.ended.values()):
                failed = now
            if now > self.started + timeout or (failed and now >= failed + patience):
                self.kill()
            time.sleep(0.002)
        return self.ended
