"""The GPU's benchmark runs, on a CPU with tiny shapes: every contender has a row, of the same shapes as the others'."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_gpu
from benchmarks.train_gpu import COMPLETE, COMPUTE, MCORE, THEIRS
from benchmarks.train_gpu_data import conversations, copy_tokenizer
from benchmarks.train_gpu_shapes import SHAPES, STAGES, sample_flops
from mmcore.data.templates import TEMPLATES, Turn, Writer
from mmcore.models.parameters import num_parameters
from mmcore.recipes import RECIPES

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_texts_are_of_the_lengths_that_flops_are_counted_for(shapes: str, stage: str, tmp_path: Path) -> None:
    shape, tokenizer = SHAPES[shapes], copy_tokenizer(tmp_path / "tokenizer")
    template = TEMPLATES[RECIPES[shape.recipe(stage)]().data.conversation]
    write = Writer(tokenizer=tokenizer, image_token_id=tokenizer.vocab_size, end_id=tokenizer.eos_id)
    for question, answer in (talk for talk, _ in zip(conversations(shape, stage, tokenizer), range(5), strict=False)):
        turns = [Turn("user", question["value"]), Turn("assistant", answer["value"])]
        segments = list(template.lay_out(turns, write))
        picture = shape.vision.num_image_embeddings - 1  # beside the one token that stands for it
        assert sum(len(segment.ids) for segment in segments) + picture - 1 == shape.lengths[stage]
        assert sum(len(segment.ids) for segment in segments if segment.is_trained) == shape.labels[stage]
    assert shape.samples_per_row(stage) > 1


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "numbers.json"
    arguments = ["--shapes", "tiny", "--stage", "sft", "--steps", "1", "--rounds", "1"]
    train_gpu.main([*arguments, "--data", str(tmp_path / "data"), "--output", str(output)])
    numbers = json.loads(output.read_text())
    assert numbers["versions"]["megatron-core"] and numbers["device"] == "CPU" and numbers["date"]
    rows = numbers["stages"]["sft"]
    assert not [row for row in rows if "error" in row]
    row_of_samples = TINY.samples_per_row("sft")
    expected = [(COMPLETE, TINY.rows["sft"] * row_of_samples), (COMPUTE, row_of_samples)]
    expected += [(name, size) for name in (MCORE, THEIRS) for size in TINY.batches]
    assert [(row["contender"], row["samples"]) for row in rows] == expected
    table = capsys.readouterr().out
    assert all(name in table for name in (COMPLETE, COMPUTE, MCORE, THEIRS))
    parameters = sum(num_parameters(TINY.architecture()).values())
    norm = 2 * TINY.vision.hidden_size  # after the tower's last layer: megatron-core's has none
    missing = {COMPUTE: 0, MCORE: norm, THEIRS: 0}
    for row in rows[1:]:
        assert row["parameters"] == parameters - missing[row["contender"]]


def test_documented_operations() -> None:
    """docs/performance.md's table of the full size."""
    text = (train_gpu.ROOT / "docs" / "performance.md").read_text()
    flops = [sample_flops(SHAPES["7b"], stage) for stage in STAGES]
    for part in flops[0].parts:
        assert f"| {part} | {' | '.join(f'{found.parts[part] / 1e12:.3f}' for found in flops)} |\n" in text
    assert f"| all | {' | '.join(f'{found.model / 1e12:.3f}' for found in flops)} |\n" in text
    assert " and ".join(f"{989e12 / found.model:.1f}" for found in flops) in text
    parameters = num_parameters(SHAPES["7b"].architecture()).values()
    assert [f"{number / 1e6:.1f}" for number in parameters] == ["303.5", "73.4", "7248.0"]


def test_rates_by_hand() -> None:
    row = {"contender": THEIRS, "samples": 8, "step_ms": [400.0, 9000.0, 500.0], "peak_memory_gib": 1.0}
    found = train_gpu.rates(row, 640, 20e12, 800.0)
    assert found == {
        "step_ms_median": 500.0,
        "samples_per_s": 16.0,
        "tokens_per_s": 10240.0,
        "tflops": pytest.approx(320),
        "mfu": pytest.approx(0.4),
    }
    assert train_gpu.rates({**row, "data_wait": [0.5, 0.01, 0.02]}, 640, 20e12, None)["data_wait_share"] == 0.02


def test_ratios_are_to_the_best_batch_of_the_others() -> None:
    speeds = ((COMPLETE, 30.0), (COMPUTE, 40.0), (MCORE, 10.0), (MCORE, 20.0), (THEIRS, 15.0))
    rows = [{"contender": name, "samples_per_s": speed} for name, speed in speeds]
    rows.append({"contender": THEIRS, "batch": 32, "error": "out of memory"})
    first, *_, last = train_gpu.compared(rows)
    assert [first[f"x_{name}"] for name in (COMPUTE, MCORE, THEIRS)] == [0.75, 1.5, 2.0]
    assert last == rows[-1]


def test_what_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One contender cannot be built, one runs out of memory at its second batch, one is fine."""
    row: dict[str, Any] = {"batch": 1, "samples": 1, "step_ms": [2.0], "peak_memory_gib": 1.0, "peak_tflops": 989.0}

    def python(*arguments: object) -> Any:
        if arguments[1] == "mmcore":
            return subprocess.CompletedProcess([], 2, "", "usage\nmmcore train: --data.path has no shards\n")
        if arguments[2] == COMPUTE:
            return subprocess.CompletedProcess([], 1, "", "torch.OutOfMemoryError: CUDA out of memory\nat exit\n")
        rows = [{"contender": arguments[2], **row}]
        rows += [{"contender": THEIRS, "batch": 2, "error": "out of memory"}] if arguments[2] == THEIRS else []
        return subprocess.CompletedProcess([], 0, "a warning\n" + "\n".join(map(json.dumps, rows)), "")

    monkeypatch.setattr(train_gpu, "python", python)
    rows = train_gpu.measure("tiny", "pretrain", "fp32", 1, 2, tmp_path)
    assert [(found["contender"], found.get("error", "")) for found in rows] == [
        (COMPLETE, "mmcore train: --data.path has no shards"),
        (COMPUTE, "out of memory"),
        (MCORE, ""),
        (THEIRS, ""),
        (THEIRS, "out of memory"),
    ]
    assert rows[2]["step_ms"] == [2.0, 2.0]  # of both rounds
    assert rows[2]["mfu"] == pytest.approx(500 * sample_flops(TINY, "pretrain").model / 989e12)
    monkeypatch.setenv("COLUMNS", "120")
    train_gpu.report("pretrain", rows)
    assert "transformers, 2 samples a step failed: out of memory\n" in capsys.readouterr().out
