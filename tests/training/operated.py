"""A small run as `mmcore train` runs it, on forked ranks, for tests of what befalls it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore import checkpoint
from mmcore.commands import train as command
from mmcore.config import ParallelConfig
from mmcore.data.shards import ShardWriter
from mmcore.models.architecture import ProjectorArch
from mmcore.models.presets import compose
from mmcore.training import loop
from mmcore.training.optimizer import wrap
from tests import ranks, tiny
from tests.data.fabricated import conversation, picture, write_tokenizer

STEPS = 8
LANGUAGE = replace(tiny.LANGUAGE, vocab_size=320)
PROJECTOR = ProjectorArch(ffn_hidden_size=40)
ARCHITECTURE = replace(compose(tiny.VISION, LANGUAGE, PROJECTOR), conversation="mistral_instruct")


def write_inputs(root: Path) -> Path:
    """A dataset, and a model with its tokenizer."""
    with ShardWriter(root / "data", samples_per_shard=20) as writer:
        for index in range(60):
            talk = conversation(f"<image>\nwhat is number {index}", f"it is number {index} " + "one " * (index % 5))
            parts = {"png": picture(index), "json": json.dumps({"id": str(index), "conversations": talk}).encode()}
            writer.write("train" if index < 50 else "val", f"{index:08d}", parts)
    write_tokenizer(root / "tokenizer")

    def write_model() -> None:
        model = tiny.build(ParallelConfig(), arch=ARCHITECTURE)
        checkpoint.save_checkpoint(
            root / "model",
            0,
            model=wrap(model),
            optimizer=None,
            architecture=ARCHITECTURE,
            tokenizer=root / "tokenizer",
            state={},
            loader_state=None,
            keep_last=1,
        )

    ranks.run(write_model, ParallelConfig(), 1)
    return root


def train(inputs: Path, run: Path, *options: object) -> int:
    """The command, on a rank; returns its exit code."""
    loop.distributed.initialize = lambda *_: None  # type: ignore[assignment]  # the test's groups are up
    arguments = ["--model.checkpoint", inputs / "model", "--data.path", inputs / "data", "--data.num-workers", 0]
    arguments += ["--checkpoint.save", run, "--checkpoint.save-interval", 4, "--train.steps", STEPS]
    arguments += ["--train.global-batch-size", 4, "--train.micro-batch-size", 1, "--optimizer.lr-warmup-steps", 2]
    arguments += ["--data.num-streams", 2, "--data.seq-length", 64, "--data.packing-buffer-size", 0]
    arguments += ["--train.precision", "fp32"]
    return command.main(["quickstart_sft", *map(str, [*arguments, *options])])


def children() -> list[int]:
    """Processes that this one has started: loader workers."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def log(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "num_tokens", "lr")} for row in rows]


def signal_all(number: int) -> None:
    """To this rank and its workers, as a scheduler sends it."""
    for pid in (os.getpid(), *children()):
        os.kill(pid, number)
