"""The GPU's benchmark runs, on a CPU with tiny shapes: every contender has a row, of the same shapes as the others'."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers.models.llava.modeling_llava  # noqa: F401  (here once, not in the ranks)

from benchmarks import train_gpu, train_gpu_peers
from benchmarks.train_gpu import COMPLETE, COMPUTE, MCORE, THEIRS
from benchmarks.train_gpu_data import make
from benchmarks.train_gpu_shapes import NUM_STREAMS, SHAPES, STAGES, is_trained, sample_flops
from mmcore import host
from mmcore.commands.train import check, parse
from mmcore.config import ParallelConfig
from mmcore.data.loader import build_loader
from mmcore.data.pictures import Pictures
from mmcore.data.tokenizer import load_tokenizer
from mmcore.models.parameters import num_parameters
from mmcore.recipes import RECIPES
from tests import ranks

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_command_of_the_full_size(stage: str, precision: str, tmp_path: Path) -> None:
    """It passes every check that needs no GPU."""
    make(replace(SHAPES["7b"], num_rows=1), tmp_path / "7b")
    arguments = train_gpu.command("7b", stage, precision, 10, tmp_path)
    config, _ = parse([*arguments, "--checkpoint.save", str(tmp_path / "run")])
    assert check(config, 1) == SHAPES["7b"].architecture()
    assert (config.train.precision, config.model.fp8) == ("bf16", {"bf16": "none", "fp8": "delayed"}[precision])
    assert config.model.freeze == RECIPES[SHAPES["7b"].recipe(stage)]().model.freeze
    assert config.train.steps == 10 + train_gpu.WARMUP


@pytest.mark.parametrize("stage", STAGES)
def test_full_rows_of_the_lengths_that_flops_are_counted_for(stage: str, tmp_path: Path) -> None:
    """Full-size samples through the loader, in more than one epoch."""
    shape = replace(SHAPES["7b"], num_rows=NUM_STREAMS)
    make(shape, tmp_path / "7b", (stage,))
    config, _ = parse([*train_gpu.command("7b", stage, "bf16", 10, tmp_path), "--checkpoint.save", str(tmp_path)])
    loader = build_loader(
        replace(config.data, num_workers=0),
        tokenizer=load_tokenizer(tmp_path / "7b" / "model" / "tokenizer"),
        conversation=config.data.conversation,
        pictures=Pictures(**shape.architecture().picture_options()),
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=1,
    )
    size = shape.samples_per_row(stage)
    for _, batch in zip(range(NUM_STREAMS + 2), loader, strict=False):
        assert set(batch.cu_seqlens.diff().tolist()) == {shape.lengths[stage]}
        assert len(batch.images) == size == len(batch.cu_seqlens) - 1
        assert batch.loss_mask.sum() == size * shape.labels[stage]


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own; the other projects' are below."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(train_gpu, "PEERS", (COMPUTE,))
    output = tmp_path / "numbers.json"
    arguments = ["--shapes", "tiny", "--stage", "sft", "--steps", "1", "--rounds", "1"]
    train_gpu.main([*arguments, "--data", str(tmp_path / "data"), "--output", str(output)])
    numbers = json.loads(output.read_text())
    assert numbers["versions"]["megatron-core"] and numbers["device"] == "CPU" and numbers["date"]
    rows = numbers["stages"]["sft"]
    assert not [row for row in rows if "error" in row]
    size = TINY.samples_per_row("sft")
    assert [(row["contender"], row["samples"]) for row in rows] == [
        (COMPLETE, TINY.rows["sft"] * size),
        (COMPUTE, size),
    ]
    assert rows[0]["x_mmcore-compute"] == rows[0]["samples_per_s"] / rows[1]["samples_per_s"]
    assert "waited for data" in capsys.readouterr().out


def rows_and_trained(name: str, stage: str) -> tuple[list[dict[str, Any]], int]:
    """What a contender's process prints, and how many numbers it trains."""
    model, *_ = train_gpu_peers.CONTENDERS[name](TINY, stage, "fp32")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return list(train_gpu_peers.rows(name, TINY, stage, "fp32", 1)), trained


@pytest.mark.parametrize("stage", STAGES)
def test_all_have_the_same_model(stage: str) -> None:
    """They run, on the batches that they are to, and as much of them is trained."""
    parts = num_parameters(TINY.architecture())
    expected = sum(number for part, number in parts.items() if is_trained(TINY, stage, f"{part}."))
    norm = 2 * TINY.vision.hidden_size  # after the tower's last layer: megatron-core's has none
    for name, missing in ((COMPUTE, 0), (MCORE, norm), (THEIRS, 0)):
        rows, trained = ranks.run(rows_and_trained, ParallelConfig(), 1, name, stage)[0]
        sizes = (TINY.samples_per_row(stage),) if name == COMPUTE else TINY.batches
        assert [(row["contender"], row["samples"], len(row["step_ms"])) for row in rows] == [
            (name, size, 1) for size in sizes
        ]
        assert {row["parameters"] for row in rows} == {sum(parts.values()) - missing}
        assert trained == expected


@pytest.mark.skipif(host.has_cuda(), reason="there is a GPU")
@pytest.mark.parametrize("name", [COMPUTE, MCORE])
def test_nothing_else_is_passed_off_as_fp8(name: str) -> None:
    with pytest.raises(ValueError, match="needs Transformer Engine and a GPU"):
        train_gpu_peers.CONTENDERS[name](TINY, "sft", "fp8")


def test_samples_of_other_lengths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those that an older version of the benchmark left in its folder."""
    length, labels = TINY.lengths["sft"], TINY.labels["sft"]
    row = {"num_samples": 4, "num_positions": 4 * length, "num_tokens": 4 * labels}
    row |= {"seconds": 0.5, "data_wait": 0.1, "memory_gib": 1.0}
    log = [json.dumps({**row, "seconds": seconds}) for seconds in (9, 9, 9, 0.5)]

    def python(*arguments: object) -> Any:
        (Path(str(arguments[-1])) / "log.jsonl").write_text("\n".join(log))
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(train_gpu, "python", python)
    (found,) = train_gpu.complete("tiny", "sft", "fp32", 1, tmp_path)
    assert (found["step_ms"], found["samples"]) == ([500.0], 4)
    log.append(json.dumps({**row, "num_positions": 4 * length + 1}))
    with pytest.raises(RuntimeError, match="delete it"):
        train_gpu.complete("tiny", "sft", "fp32", 1, tmp_path)


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
