"""`mmcore train` as its user starts it: killed, it goes on as if nothing had happened, bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from PIL import Image

from mmcore import checkpoint
from mmcore.config import ParallelConfig
from mmcore.training.optimizer import wrap
from tests import ranks, tiny

STEPS, KILLED_AFTER, SAVED = 8, 5, 4


def write_model(folder: Path, tokenizer: Path) -> None:
    model = tiny.build(ParallelConfig())
    checkpoint.save_checkpoint(
        folder,
        0,
        model=wrap(model),
        optimizer=None,
        architecture=model.architecture,
        tokenizer=tokenizer,
        state={},
        loader_state=None,
        keep_last=1,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: Any) -> Path:
    """A tokenizer, a tiny model and a prepared dataset, with one picture that is broken after preparation."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "tokenizer").mkdir()
    words = ["one two three four five six seven eight nine ten what is this a picture of the number"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(root / "tokenizer" / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    (root / "images").mkdir()
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = []
    for index in range(60):
        Image.new("RGB", (16, 16), (index * 4, 255 - index * 4, 7)).save(root / "images" / f"{index}.png")
        question = {"from": "human", "value": "<image>\nwhat is this"}
        answer = {"from": "gpt", "value": f"a picture of the number {' '.join(numbers[: index % 7 + 1])}"}
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": [question, answer]})
    (root / "rows.json").write_text(json.dumps(rows))
    arguments = ["--annotations", root / "rows.json", "--images", root / "images", "--output", root / "data"]
    arguments += ["--val-annotations", root / "rows.json"]
    command = [sys.executable, "-m", "mmcore", "prepare", "llava-instruct", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    ranks.run(write_model, ParallelConfig(), 1, root / "model", root / "tokenizer")
    return root


def command(inputs: Path, run: Path, *options: object) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "mmcore"]
    train = ["train", "quickstart_sft", "--model.checkpoint", inputs / "model", "--data.path", inputs / "data"]
    small = ["--checkpoint.save", run, "--checkpoint.save-interval", SAVED, "--train.steps", STEPS]
    small += ["--train.global-batch-size", 8, "--train.micro-batch-size", 4, "--optimizer.lr-warmup-steps", 2]
    small += ["--parallel.tensor-model-parallel-size", 2, "--logging.log-interval", 1, "--data.num-streams", 2]
    small += ["--train.val-interval", 4, "--train.val-batches", 2]
    small += ["--data.seq-length", 128, "--data.packing-buffer-size", 16]
    return list(map(str, [*launch, *train, *small, *options]))


def validation(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def log(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "num_tokens", "lr")} for row in rows]


def test_killed_and_resumed(inputs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(inputs, tmp_path / "whole"), env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    whole = log(tmp_path / "whole")
    assert [row["step"] for row in whole] == list(range(1, STEPS + 1))
    first, last = validated = validation(tmp_path / "whole")
    assert (first["step"], last["step"]) == (4, 8) and first["num_samples"] == last["num_samples"] > 16
    assert last["loss"] < first["loss"] and "step      8/8 | validation loss" in done.stderr
    assert "samples/s" in done.stderr and "left 0:00:0" in done.stderr
    assert [path.name for path in sorted((tmp_path / "whole").glob("step_*"))] == ["step_00000004", "step_00000008"]

    run = tmp_path / "killed"
    with subprocess.Popen(
        command(inputs, run),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not ((run / "log.jsonl").exists() and len((run / "log.jsonl").read_text().splitlines()) >= KILLED_AFTER):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        for pid in map(int, [*workers, process.pid]):  # torchrun gives workers sessions of their own: they would go on
            os.killpg(pid, signal.SIGKILL)
    assert (run / "step_00000004").is_dir() and not (run / "step_00000008").exists()
    other = shutil.copytree(run, tmp_path / "other")

    # It goes on saving in the background, which changes nothing.
    going_on = command(inputs, run, "--checkpoint.async-save", "--checkpoint.save-interval", 1)
    done = subprocess.run(going_on, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert [path.name for path in sorted(run.glob("*step_*"))] == ["step_00000007", "step_00000008"]
    assert log(run) == whole and validation(run) == validated
    kept = [json.loads((at / "step_00000008" / "run.json").read_text()) for at in (run, tmp_path / "whole")]
    counted = [(state["step"], state["consumed_samples"], state["consumed_tokens"]) for state in kept]
    assert counted[0] == counted[1] and counted[0][2] == sum(row["num_tokens"] for row in whole)

    # The report tells of both jobs, from what they have left.
    assert (tmp_path / "whole" / "loss.svg").exists()
    page = (run / "report.html").read_text()
    assert "Training run, 8 of 8 steps" in page and ">finished<" in page
    assert re.search(r"Began again after step</th><td[^>]*>4<", page)
    assert re.search(r"Layout</th><td[^>]*>tensor 2 x .*data 1, 2 ranks on cpu<", page)

    # Once finished, starting it again changes nothing.
    done = subprocess.run(command(inputs, run), env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and log(run) == whole

    # On two replicas with loader workers instead of one cut in two: the same batches, rounded otherwise.
    options = ["--parallel.tensor-model-parallel-size", 1, "--train.micro-batch-size", 4, "--data.num-workers", 2]
    done = subprocess.run(
        command(inputs, other, *options), env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    for row, expected in zip(log(other), whole, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    for row, expected in zip(validation(other), validated, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
