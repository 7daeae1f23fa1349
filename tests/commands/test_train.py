"""What the command checks and settles before a run begins."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from mmcore import distributed
from mmcore.checkpoint import SaveError
from mmcore.checkpoint_files import checkpoint_bytes
from mmcore.commands import train as command
from mmcore.commands.train import check, parse
from mmcore.config import CheckpointConfig, DataConfig, LoggingConfig, ModelConfig, RunConfig, TrainConfig
from mmcore.data.stream import TooManySkippedError
from mmcore.models.architecture import PictureArch, save_architecture
from mmcore.training import batches, loop
from mmcore.training.policy import BadStepError
from mmcore.training.run_lock import run_lock
from tests import tiny
from tests.data.fabricated import write_shards, write_tokenizer


def test_the_mode_of_pictures(tmp_path: Path) -> None:
    """Of the checkpoint, unless the run says another; it is not for pictures in tiles, whose mode is given."""
    config = RunConfig(
        model=ModelConfig(checkpoint=str(tmp_path)),
        data=DataConfig(path=str(tmp_path), seq_length=128),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run")),
    )
    padded = replace(config, data=replace(config.data, image_mode="pad"))
    architecture = replace(tiny.architecture(), pictures=PictureArch(mode="squash"))
    save_architecture(architecture, tmp_path)
    assert check(config, 1) == architecture
    assert check(padded, 1) == replace(architecture, pictures=PictureArch(mode="pad"))
    tiles = PictureArch(mode="squash", tiling="dynamic", max_num_tiles=4)
    save_architecture(replace(architecture, pictures=tiles), tmp_path)
    assert check(config, 1).pictures == tiles
    with pytest.raises(ValueError, match="image mode 'pad' with tiling 'dynamic'"):
        check(padded, 1)


def test_the_mode_is_an_option() -> None:
    config, _ = parse(["quickstart_sft", "--data.image-mode", "pad"])
    assert config.data.image_mode == "pad"


def test_too_little_disk_is_said_before_anything_starts(tmp_path: Path) -> None:
    """Two checkpoints that stay and the one being written, of the tiny model."""
    save_architecture(tiny.architecture(), tmp_path)
    config = RunConfig(
        model=ModelConfig(checkpoint=str(tmp_path), freeze=("vision_model",)),
        data=DataConfig(path=str(tmp_path), seq_length=128),
        train=TrainConfig(steps=1_000),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run"), save_interval=1),
    )
    assert check(config, 1)
    size = checkpoint_bytes(tiny.architecture(), ("vision_model",), 2)
    with mock.patch.object(shutil, "disk_usage", lambda folder: mock.Mock(free=3 * size - 1)):
        with pytest.raises(ValueError, match=r"run has too little room: 3 checkpoints of 0\.00162 GB at once"):
            check(config, 1)
        check(replace(config, checkpoint=replace(config.checkpoint, keep_last=1)), 1)


def test_too_little_memory_is_said_before_anything_starts(tmp_path: Path) -> None:
    """All that is in a checkpoint goes through the host."""
    save_architecture(tiny.architecture(), tmp_path)
    config = RunConfig(
        model=ModelConfig(checkpoint=str(tmp_path), freeze=("vision_model",)),
        data=DataConfig(path=str(tmp_path), seq_length=128),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run")),
    )
    size = checkpoint_bytes(tiny.architecture(), ("vision_model",), 2)
    for memory in (size, size - 1):
        with mock.patch.object(command, "host_memory", lambda memory=memory: memory):
            if memory == size:
                check(config, 1)
                continue
            with pytest.raises(ValueError, match=r"--checkpoint.save-interval needs 0\.00162 GB of it for the 1 ranks"):
                check(config, 1)
            check(replace(config, checkpoint=CheckpointConfig(save=str(tmp_path / "run"), save_interval=0)), 1)


@pytest.mark.parametrize(
    ("error", "speaking"),
    [(BadStepError("the fault"), "0"), (SaveError("the fault"), "0"), (TooManySkippedError("the fault"), "01")],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_is_said_once(
    error: Exception,
    speaking: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the first rank where all find it, by the rank that finds it where the others do not."""
    monkeypatch.setattr(loop, "train", mock.Mock(side_effect=error))
    monkeypatch.setattr(command, "check", lambda *_: None)
    monkeypatch.setattr(batches, "check_data", lambda *_: None)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert command.main(["quickstart_sft", "--checkpoint.save", str(tmp_path)]) == 1
        said = "mmcore train: the fault\n" if rank in speaking else ""
        assert capsys.readouterr().err == said


def test_weights_and_biases_is_missed_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_architecture(tiny.architecture(), tmp_path)
    config = RunConfig(
        model=ModelConfig(checkpoint=str(tmp_path)),
        data=DataConfig(path=str(tmp_path), seq_length=128),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run")),
        logging=LoggingConfig(wandb_project="mine"),
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs wandb, which is not installed"):
        check(config, 1)


# A job that holds a run's folder, with a child as a loader's worker is one, which outlives it.
JOB = """
import os, sys, time
from pathlib import Path
from mmcore.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_one_job_at_a_time_writes_a_run(tmp_path: Path) -> None:
    """Another is refused until the first is gone, however it goes."""
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", JOB, run], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout
        child = int(job.stdout.readline())
        with pytest.raises(ValueError, match=rf"another job, process {job.pid} on .*`kill {job.pid}`"), run_lock(run):
            pass
        (run / "lock").write_text("")
        with pytest.raises(ValueError, match="is being written by another job: wait for it"), run_lock(run):
            pass
        job.send_signal(signal.SIGKILL)
        job.wait()
        with run_lock(run):
            assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
            assert Path(f"/proc/{child}").exists()
        os.kill(child, signal.SIGKILL)


def test_the_command_holds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it trains; a rank that writes no log takes no part in it."""

    def another(*_: object) -> None:
        code = "import sys; from pathlib import Path; from mmcore.training.run_lock import run_lock\n"
        code += "with run_lock(Path(sys.argv[1])): pass"
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
        refused.append("is being written by another job" in done.stderr)

    refused: list[bool] = []
    monkeypatch.setattr(loop, "train", another)
    monkeypatch.setattr(command, "check", lambda *_: None)
    monkeypatch.setattr(batches, "check_data", lambda *_: None)
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert command.main(["quickstart_sft", "--checkpoint.save", str(tmp_path)]) == 0
    assert refused == [False, True]


def test_without_locks_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "lockf", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with run_lock(tmp_path):
        pass
    said = f"{tmp_path} cannot be locked (No locks available): see to it that no other job writes it\n"
    assert capsys.readouterr().err == said
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--checkpoint\.save .*file cannot be written: "), run_lock(tmp_path / "file"):
        pass


@pytest.mark.parametrize("end", [None, BadStepError("bad"), KeyboardInterrupt()], ids=["done", "bad step", "Ctrl-C"])
def test_every_end_leaves_a_report(
    end: BaseException | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def trained(*_: object) -> None:
        (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        if end:
            raise end

    monkeypatch.setattr(loop, "train", trained)
    monkeypatch.setattr(command, "check", lambda *_: None)
    monkeypatch.setattr(batches, "check_data", lambda *_: None)
    with pytest.raises(KeyboardInterrupt) if isinstance(end, KeyboardInterrupt) else nullcontext():
        assert command.main(["quickstart_sft", "--checkpoint.save", str(tmp_path)]) == (1 if end else 0)
    assert (tmp_path / "loss.svg").exists()
    assert capsys.readouterr().err.endswith(f"{tmp_path}/report.html: the run's curves and numbers\n")


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "train", lambda *_: (tmp_path / "log.jsonl").write_text('{"step": 1, "sources": 5}\n'))
    monkeypatch.setattr(command, "check", lambda *_: None)
    monkeypatch.setattr(batches, "check_data", lambda *_: None)
    assert command.main(["quickstart_sft", "--checkpoint.save", str(tmp_path)]) == 0
    said = "mmcore train: no report.html was written: AttributeError: 'int' object has no attribute 'items'\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"val_interval": 5},
            "val-interval 5 reads a val split, and the dataset .* has no samples in its split 'val': ",
        ),
        (
            {"val_interval": 5, "path": "blend.yaml"},
            "interval 5 reads a val split, and the blend .*blend.yaml has no split 'val': name .*; or leave the option",
        ),
        ({"conversation": "mistral"}, "no conversation template 'mistral', did you mean 'mistral_instruct'"),
        ({"seq_length": 2}, "seq-length 2 has no room for a picture"),
        ({"num_streams": 3}, "dealt to 3 streams, which 2 data parallel ranks cannot share evenly"),
    ],
)
def test_data_that_does_not_fit_is_said_before_ranks_find_each_other(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    architecture = replace(tiny.architecture(), image_token_id=300, conversation="mistral_instruct")
    save_architecture(architecture, write_tokenizer(tmp_path / "model" / "tokenizer").parent)
    write_shards(tmp_path / "data", 40)
    blend = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": {"path": "data"}}}
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend))
    data = {"path": "data", "num_workers": 0, "seq_length": 64, **options}
    data["path"] = str(tmp_path / data["path"])
    config = RunConfig(
        model=ModelConfig(checkpoint=str(tmp_path / "model")),
        data=DataConfig(**{key: value for key, value in data.items() if key != "val_interval"}),
        train=TrainConfig(val_interval=options.get("val_interval", 0)),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run")),
    )
    monkeypatch.setattr(command, "parse", lambda argv: (config, False))
    monkeypatch.setattr(distributed, "initialize", mock.Mock(side_effect=AssertionError("a process group is begun")))
    with pytest.raises(ValueError, match=message):
        command.main(["quickstart_sft"])
