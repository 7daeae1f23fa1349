"""Utilisation of each step, and the line at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmcore import host
from mmcore.config import ModelConfig, RunConfig, StageConfig, TrainConfig
from mmcore.models.architecture import save_architecture
from mmcore.models.flops import Work, step_flops
from mmcore.training.speed import Speed
from tests import tiny

WORK = Work(num_images=3, num_positions=100, num_pairs=2000.0, num_labels=20)
SIZES = {"vision_projection.encoder.linear_fc1.weight": 7, "language_model.output_layer.weight": 11}


def speed(**config: Any) -> Speed:
    return Speed(RunConfig(**config), tiny.architecture(), 4, SIZES)


def test_a_step_of_known_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "peak_tflops", lambda: 1e-3)
    frozen = ("vision_model", "language_model")
    found = speed(model=ModelConfig(freeze=frozen, recompute="full")).report(1, WORK, 0.5, 0.1, 2)
    flops = step_flops(tiny.architecture(), WORK, lambda name: name.split(".")[0] not in frozen, "full")
    assert found["tflops"] == pytest.approx(flops.model / 0.5 / 4 / 1e12, rel=1e-3)
    assert found["mfu"] == pytest.approx(found["tflops"] / 1e-3, rel=1e-3)
    assert found["hfu"] == pytest.approx(flops.hardware / 0.5 / 4 / 1e9, rel=1e-3)
    assert flops.hardware > flops.model


def test_without_a_known_peak_there_is_no_share_of_it() -> None:
    one = speed()
    assert one.report(1, WORK, 0.5, 0.1, 2).keys() == {"tflops"}
    assert one.summary()["mfu"] is None


def test_the_summary_leaves_out_the_first_tenth() -> None:
    one = speed(train=TrainConfig(steps=20, seed=7))
    for step in range(1, 21):
        one.report(step, WORK, 60.0 if step <= 2 else 0.5, 0.05, 2)
    found = one.summary()
    assert (found["samples_per_s"], found["tokens_per_s"], found["step_ms_median"]) == (4.0, 200.0, 500.0)
    assert found["data_wait_share"] == 0.1 and found["peak_memory_gib"] > 0
    assert found["config"] == {"--train.steps": "20", "--train.seed": "7"}
    assert found["params"]["trained"] == 18 and found["params"]["all"] > 100_000


def test_what_is_trained_follows_the_stages() -> None:
    stages = (StageConfig(name="a", until=1, freeze=("language_model",)), StageConfig(name="b"))
    one = speed(train=TrainConfig(steps=2, stages=stages))
    first = one.report(1, WORK, 1.0, 0.0, 1)["tflops"]
    assert one.summary()["params"]["trained"] == 7
    assert first < one.report(2, WORK, 1.0, 0.0, 1)["tflops"] and one.summary()["params"]["trained"] == 18


def test_a_run_without_data_weights_or_checkpoints(tmp_path: Path) -> None:
    """Its last line is the summary; with a folder it leaves its log there, and nothing that is large."""
    save_architecture(tiny.architecture(), tmp_path)
    options = "--model.weights random --data.synthetic --data.seq-length 128 --checkpoint.save-interval 0"
    options += " --train.steps 4 --optimizer.lr-warmup-steps 1 --logging.module-times"
    options += f" --checkpoint.save {tmp_path / 'run'}"
    command = ["mmcore", "train", "quickstart_sft", "--model.checkpoint", str(tmp_path), *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert list(found) == [
        "samples_per_s", "tokens_per_s", "tflops", "mfu", "hfu", "peak_memory_gib", "step_ms_median",
        "data_wait_share", "params", "config",
    ]  # fmt: skip
    assert found["samples_per_s"] > 0 and found["tflops"] > 0 and found["config"]["--data.synthetic"] == "True"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("DONE", "lock", "log.jsonl", "starts.jsonl")
    ]
    rows = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for row in rows:
        parts = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("seconds/")}
        assert parts.keys() >= {"vision_model", "vision_projection", "language_model", "output_layer", "optimizer"}
        assert row["num_images"] == row["num_samples"] > 0
    assert sum(parts.values()) == pytest.approx(rows[-1]["seconds"], rel=0.2)
