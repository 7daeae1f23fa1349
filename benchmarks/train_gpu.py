"""How fast one GPU trains, beside megatron-core's and transformers' LLaVA on the same shapes.

`python -m benchmarks.train_gpu --output train_gpu.json`, and `--shapes tiny` to see on a CPU that it works

CLIP ViT-L/14@336, a projector and Mistral-7B with random weights, frozen as the recipes freeze for alignment (pretrain:
640 tokens a sample) and for instruction tuning (sft: 1088). Measured, each in a process of its own, in rounds of all:

- mmcore: `mmcore train RECIPE` with everything on: a loader that decodes JPEGs and encodes texts from shards, packing
  to rows of 8192 tokens, optimizer, checks of every step, logs. The time of a step is that of its row in log.jsonl.
- mmcore-compute: the same model on one packed row that lies on the GPU; forward and backward pass alone.
- megatron-core: its plain LLaVAModel with Transformer Engine, at micro batches of 1, 8 and 32 samples; likewise alone.
- transformers: LlavaForConditionalGeneration with torch's attention kernels, at the same; likewise alone.

`--precision fp8` is that of the language model's layers, with delayed scaling; transformers stays in bf16.

All samples of a stage have the same length, so that the others pad nothing. The median step of all rounds counts,
without the first three of each. FLOPs are those that the mathematics needs (`mmcore/models/flops.py`), for all alike:
MFU is their rate by the GPU's dense bf16 peak. See docs/performance.md.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.train_gpu_data import make
from benchmarks.train_gpu_shapes import FP8_RECIPE, NUM_STREAMS, SHAPES, STAGES, number_format, sample_flops

COMPLETE, COMPUTE, MCORE, THEIRS = "mmcore", "mmcore-compute", "megatron-core", "transformers"
PEERS = (COMPUTE, MCORE, THEIRS)
ROOT = Path(__file__).parents[1]
DATA = Path(tempfile.gettempdir()) / "mmcore_train_gpu"
WARMUP = 3  # steps of the complete trainer that do not count
TIMEOUT = 1800  # seconds of a process
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers")
Row = dict[str, Any]


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A process of its own, from the repository's root."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end within {TIMEOUT} s")


def why(done: subprocess.CompletedProcess[str]) -> str:
    """What ended a process that failed, in a line."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    found = [line for line in lines if "Error" in line] or lines or [f"exit code {done.returncode}"]
    return "out of memory" if "OutOfMemoryError" in found[-1] else found[-1].strip()


def command(shapes: str, stage: str, precision: str, steps: int, data: Path) -> list[str]:
    """Arguments of `mmcore train`, but for the folder of the run."""
    shape = SHAPES[shapes]
    options = {
        "model.checkpoint": data / shapes / "model",
        "model.weights": "random",
        "data.path": data / shapes / stage,
        "data.seq-length": shape.seq_length,
        "data.packing-buffer-size": 256,
        "data.num-streams": NUM_STREAMS,
        "data.num-workers": shape.num_workers,
        "parallel.tensor-model-parallel-size": 1,
        "train.steps": WARMUP + steps,
        "train.global-batch-size": shape.rows[stage],
        "train.micro-batch-size": 1,
        "train.precision": number_format(precision),
        "optimizer.states": shape.states(stage, precision),
        "optimizer.lr-warmup-steps": 1,
        "checkpoint.save-interval": 0,
        "logging.log-interval": 1,
        **({} if shape.is_preset else {"model.vision": "", "model.language": ""}),
        **({"model.fp8": FP8_RECIPE} if precision == "fp8" else {}),
    }
    return [shape.recipe(stage), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def complete(shapes: str, stage: str, precision: str, steps: int, data: Path) -> list[Row]:
    """The command, as a user starts it."""
    shape = SHAPES[shapes]
    with tempfile.TemporaryDirectory() as run:
        arguments = command(shapes, stage, precision, steps, data)
        done = python("-m", "mmcore", "train", *arguments, "--checkpoint.save", run)
        if done.returncode:
            return [{"contender": COMPLETE, "batch": 0, "error": why(done)}]
        log = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()][WARMUP:]
    samples = log[0]["num_samples"]
    for row in log:
        found = (row["num_samples"], row["num_positions"], row["num_tokens"])
        if found != (samples, samples * shape.lengths[stage], samples * shape.labels[stage]):
            raise RuntimeError(f"{data / shapes} holds samples of other lengths ({row}): delete it, it is made anew")
    return [
        {
            "contender": COMPLETE,
            "batch": samples,
            "samples": samples,
            "step_ms": [row["seconds"] * 1e3 for row in log],
            "data_wait": [row["data_wait"] for row in log],
            "peak_memory_gib": max(row["memory_gib"] for row in log),
        }
    ]


def peer(name: str, shapes: str, stage: str, precision: str, steps: int) -> list[Row]:
    """What `benchmarks.train_gpu_peers` measures; what it had measured before it failed stays."""
    done = python("-m", "benchmarks.train_gpu_peers", name, shapes, stage, precision, steps)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return rows + ([{"contender": name, "batch": 0, "error": why(done)}] if done.returncode else [])


def measure(shapes: str, stage: str, precision: str, steps: int, rounds: int, data: Path) -> list[Row]:
    """All contenders in turn, several times over; a row for each of their batches."""
    found: list[Row] = []
    for _ in range(rounds):
        found += complete(shapes, stage, precision, steps, data)
        for name in PEERS:
            found += peer(name, shapes, stage, precision, steps)
    keys = dict.fromkeys((row["contender"], row["batch"]) for row in found)
    merged = [joined([row for row in found if (row["contender"], row["batch"]) == key]) for key in keys]
    peak = next((row["peak_tflops"] for row in merged if row.get("peak_tflops")), None)
    flops = sample_flops(SHAPES[shapes], stage).model
    for row in merged:
        if "error" not in row:
            row |= rates(row, SHAPES[shapes].lengths[stage], flops, peak)
    order = (COMPLETE, *PEERS)
    return sorted(compared(merged), key=lambda row: (order.index(row["contender"]), row["batch"]))


def joined(rows: Sequence[Row]) -> Row:
    """One batch of a contender over all rounds: what failed once has failed."""
    failed = [row for row in rows if "error" in row]
    if failed:
        return failed[0]
    merged = {**rows[0], "peak_memory_gib": max(row["peak_memory_gib"] for row in rows)}
    for name in ("step_ms", "data_wait"):
        if name in merged:
            merged[name] = [item for row in rows for item in row[name]]
    return merged


def rates(row: Row, length: int, flops: float, peak: float | None) -> Row:
    """What follows from the median step.

    Args:
        length: positions of a sample.
        flops: that a sample needs.
        peak: of the device, in TFLOP/s; None if unknown.
    """
    milliseconds = statistics.median(row["step_ms"])
    samples = row["samples"] / milliseconds * 1e3
    tflops = samples * flops / 1e12
    return {
        "step_ms_median": milliseconds,
        "samples_per_s": samples,
        "tokens_per_s": samples * length,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        **({"data_wait_share": statistics.median(row["data_wait"])} if "data_wait" in row else {}),
    }


def compared(rows: Sequence[Row]) -> list[Row]:
    """With the ratio of each speed to the others': to their best batch, and of the complete trainer to its compute."""
    best = {name: max((row.get("samples_per_s", 0.0) for row in rows if row["contender"] == name), default=0.0)
            for name in (COMPUTE, MCORE, THEIRS)}  # fmt: skip
    return [
        {**row, **{f"x_{name}": row["samples_per_s"] / speed for name, speed in best.items() if speed}}
        if "error" not in row
        else row
        for row in rows
    ]


def report(stage: str, rows: Sequence[Row]) -> None:
    """Print a table, and below it the wait for data and what failed."""
    console = Console()
    console.print(table(stage, rows))
    for row in rows:
        if "data_wait_share" in row:
            console.print(
                f"{row['contender']} waited for data {row['data_wait_share']:.1%} of its time", highlight=False
            )
        if "error" in row:
            batch = f", {row['batch']} samples a step" if row["batch"] else ""
            console.print(f"{row['contender']}{batch} failed: {row['error']}", markup=False, highlight=False)


def table(stage: str, rows: Sequence[Row]) -> Table:
    shown = Table(title=stage)
    for name in ("", "samples a step", "step ms", "samples/s", "tokens/s", "TFLOP/s", "MFU", "peak GiB"):
        shown.add_column(name, justify="right" if name else "left")
    for name in ("x transformers", "x megatron-core", "x compute"):
        shown.add_column(name, justify="right")
    for row in rows:
        if "error" in row:
            shown.add_row(row["contender"], "failed")
            continue
        ratios = (f"{row[f'x_{name}']:.2f}" if f"x_{name}" in row else "-" for name in (THEIRS, MCORE, COMPUTE))
        shown.add_row(
            row["contender"],
            str(row["samples"]),
            f"{row['step_ms_median']:.1f}",
            f"{row['samples_per_s']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tflops']:.3g}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['peak_memory_gib']:.1f}",
            *ratios,
        )
    return shown


def versions() -> dict[str, str | None]:
    """Of what computes; None for what is not there."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "both"], default="both")
    parser.add_argument("--shapes", choices=list(SHAPES), default="7b")
    parser.add_argument("--precision", choices=["bf16", "fp8", "fp32"], help="bf16, and fp32 for the tiny model")
    parser.add_argument("--steps", type=int, default=10, help="timed ones of each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that keeps the shards")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    precision = options.precision or SHAPES[options.shapes].precision
    data = options.data.absolute()
    make(SHAPES[options.shapes], data / options.shapes)
    results = {}
    for stage in STAGES if options.stage == "both" else (options.stage,):
        results[stage] = measure(options.shapes, stage, precision, options.steps, options.rounds, data)
        report(stage, results[stage])
    device = next(({name: row[name] for name in ("device", "cuda")} for row in results[stage] if "device" in row), {})
    about = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **device, "versions": versions()}
    print(json.dumps(about))
    if options.output:
        asked = {"shapes": options.shapes, "precision": precision, "steps": options.steps, "rounds": options.rounds}
        options.output.write_text(json.dumps({**about, **asked, "stages": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
