"""A tiny checkpoint that answers (in gibberish), and commands that talk from it, each a process of its own."""

import os
import pty
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmcore.__main__ import main
from mmcore.checkpoint import load_checkpoint, save_checkpoint
from mmcore.config import ParallelConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.data.templates import Turn
from mmcore.data.tokenizer import load_tokenizer
from mmcore.inference.dialogue import lay_out
from mmcore.inference.engine import Engine, Request
from mmcore.models.architecture import load_architecture, newest
from mmcore.models.llava import LlavaModel, base_config
from tests import ranks, tiny
from tests.data.vocabularies import spaced

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
MAX_LENGTH = 4096
ENDLESS = 0.01  # a repetition penalty that lets nothing new be said, an end neither: 3000 tokens take half a minute


def write_checkpoint(run: Path, conversation: str = "vicuna_v1") -> Path:
    """A run with one checkpoint: random weights, and a vocabulary of a few hundred pieces."""
    tokenizer = spaced(run.parent / f"{run.name}-tokenizer", SPECIAL)
    size = load_tokenizer(tokenizer).vocab_size
    base = tiny.architecture()
    assert base.language is not None
    language = replace(base.language, vocab_size=size, max_position_embeddings=MAX_LENGTH)
    architecture = replace(base, language=language, image_token_id=size, conversation=conversation)

    def save() -> None:
        model = tiny.build(ParallelConfig(), arch=architecture)
        content = {"architecture": architecture, "tokenizer": tokenizer, "state": {}, "loader_state": None}
        save_checkpoint(run, 1, keep_last=1, model=model, optimizer=None, **content)

    ranks.run(save, ParallelConfig(), 1)
    return run


def engine_answers(
    checkpoint: Path, talks: Sequence[tuple[Sequence[Turn], Sequence[bytes]]], num_new: int
) -> list[tuple[str, int]]:
    """What the engine by itself answers to each conversation with its pictures, and how many tokens that has."""

    def answers() -> list[tuple[str, int]]:
        folder = newest(checkpoint)
        architecture, tokenizer = load_architecture(folder), load_tokenizer(folder / TOKENIZER_DIR)
        model = LlavaModel(architecture, "local", **base_config(ParallelConfig()))
        load_checkpoint(folder, model)
        engine = Engine(model.eval(), tokenizer, max_batch_size=1, max_length=500)
        found = []
        for turns, files in talks:
            prompt = lay_out(turns, files, tokenizer, architecture, 500)
            engine.add(Request(prompt=prompt, max_new_tokens=num_new, end_ids=(tokenizer.eos_id,)))
            text = ""
            while not engine.is_idle:
                text += "".join(delta.text for delta in engine.step())
            found.append((text.strip(), len(prompt.tokens)))
        return found

    return ranks.run(answers, ParallelConfig(), 1)[0]


def rank_environment(size: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


class Command:
    """`mmcore VERB ...` in a fork of this process, which has imported everything already."""

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        stdin: str | None = "",
    ) -> None:
        """
        Args:
            folder: for what it writes.
            stdin: what it reads from a pipe; None gives it a terminal, which also shows what it writes.
        """
        self.paths = [folder / f"{time.monotonic_ns()}.{kind}" for kind in ("in", "out", "err")]
        self.status: int | None = None
        self.seen, self.matched = b"", 0  # what the terminal has shown, and how much of its text was waited for
        if stdin is None:
            self.id, self.terminal = pty.fork()
        else:
            self.paths[0].write_text(stdin)
            self.id, self.terminal = os.fork(), -1
        if not self.id:
            status = 1
            try:
                if stdin is not None:
                    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
                    for number, (path, mode) in enumerate(zip(self.paths, modes, strict=True)):
                        os.dup2(os.open(path, mode), number)
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
                os.environ.update({"XDG_STATE_HOME": str(folder), "TERM": "xterm", "COLUMNS": "300"})
                os.environ.update(environment or {})
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.argv = ["mmcore", *map(str, arguments)]
                status = main()
                sys.stdout.flush()
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)

    @property
    def output(self) -> str:
        return self.paths[1].read_text() if self.paths[1].exists() else ""

    @property
    def errors(self) -> str:
        return self.paths[2].read_text() if self.paths[2].exists() else ""

    def wait_for(self, pattern: str, timeout: float = 30.0) -> re.Match[str]:
        """Wait until it has written something; on a terminal, since the last match."""
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.shown())):
            self._poll()
            assert self.status is None and time.monotonic() < deadline, f"{self.shown()[-2000:]!r}\n{self.errors}"
            time.sleep(0.01)
        self.matched += found.end()
        return found

    def shown(self) -> str:
        if self.terminal < 0:
            return self.output
        os.set_blocking(self.terminal, False)
        try:
            while data := os.read(self.terminal, 1 << 16):
                self.seen += data
        except OSError:  # nothing more, now or ever
            pass
        text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]|\r", b"", self.seen)  # without colours and moves
        return text.decode(errors="replace")[self.matched :]

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def kill(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.id, number)

    def end(self, timeout: float = 30.0) -> int:
        """Wait for its exit code; one that does not end is killed."""
        deadline = time.monotonic() + timeout
        while self.status is None and time.monotonic() < deadline:
            self._poll()
            time.sleep(0.01)
        if self.status is None:
            self.kill(signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])
        return self.status

    def _poll(self) -> None:
        if self.status is None and (found := os.waitpid(self.id, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(found[1])
