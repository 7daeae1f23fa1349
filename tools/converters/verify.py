"""Prove a checkpoint: at every layout it computes what the original library computes, in fp32.

`python tools/converters/verify.py --checkpoint language --reference Mistral-7B-v0.3`

Compares hidden state by hidden state, so that a failure names the first layer that differs. Runs on
the CPU also where a GPU is: its matrix products are rounded otherwise (TF32), and a layout takes more
ranks than a machine may have GPUs.
"""

import os
import sys

if __name__ == "__main__":
    # Before torch is imported. One thread here: a rank that is forked from a process with threads hangs.
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from checkpoint_folder import stored_tensors
from command_line import run
from conversion import VerificationError
from megatron_ranks import Difference, compare
from memory import check_memory
from probe import build_probe, unreached
from reference import INDEX, ReferenceConfig
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from mmcore.config import ParallelConfig
from mmcore.constants import EXIT_USAGE, LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import Architecture, check_layout, load_architecture, newest

REFERENCE = Path(__file__).with_name("reference.py")
LAYOUTS = tuple(
    ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    for tensor, pipeline in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """Compare a checkpoint with the original model in fp32, at several layouts, on the CPU."""

    checkpoint: Path
    """Folder that a converter, combine.py or mmcore train wrote."""
    reference: tuple[Path, ...] = ()
    """What it was made of, as the converter took it: a folder, a file of weights, or LLaVA's folder and its vision
    tower's. Without it, the checkpoint's own export is."""
    tolerance: float = 1e-4
    """Largest difference at any place, relative to the largest value there."""
    timeout: float = 3600.0
    """Seconds that the original, and each layout, may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One layout's result."""

    layout: ParallelConfig
    differences: list[Difference]
    """At every place, in the order of the computation."""

    @property
    def worst(self) -> Difference:
        return max(self.differences, key=lambda difference: difference.error)

    def first_above(self, tolerance: float) -> Difference | None:
        return next((difference for difference in self.differences if not difference.error <= tolerance), None)


def split_layouts(architecture: Architecture) -> tuple[list[ParallelConfig], dict[ParallelConfig, str]]:
    """The layouts that the architecture allows, and why it does not the others."""
    allowed, left_out = [], {}
    for layout in LAYOUTS:
        try:
            check_layout(architecture, layout)
            allowed.append(layout)
        except ValueError as error:
            left_out[layout] = str(error)
    return allowed, left_out


def outcomes(
    folder: Path,
    references: Sequence[Path],
    layouts: Sequence[ParallelConfig],
    timeout: float = 120.0,
    run_original: Callable[[ReferenceConfig, float], object] | None = None,
) -> Iterator[Outcome]:
    """Run the original, then ours layout by layout.

    Args:
        folder: checkpoint.
        references: as `VerifyConfig.reference`.
        timeout: seconds for the original, and for each layout.
        run_original: other than in a process of its own.
    Raises:
        ValueError: the original cannot be opened.
        VerificationError: it, or a rank, failed.
        TimeoutError: the time ran out.
    """
    # Beside the checkpoint: the export and the hidden states of a large model fill a /tmp that is memory.
    place = folder.parent if os.access(folder.parent, os.W_OK) else None
    with TemporaryDirectory(prefix=".verify-", dir=place) as work:
        probe, theirs = Path(work) / "probe.pt", Path(work) / "theirs"
        torch.save(build_probe(load_architecture(folder)), probe)
        originals = tuple(references) or (_export(folder, Path(work) / "export"),)
        config = ReferenceConfig(input=originals, checkpoint=folder, probe=probe, output=theirs)
        (run_original or _run_original)(config, timeout)
        places = [tuple(place) for place in json.loads((theirs / INDEX).read_text())["places"]]
        for layout in layouts:
            try:
                yield Outcome(layout=layout, differences=compare(layout, folder, probe, theirs, places, timeout))
            except (ProcessRaisedException, ProcessExitedException) as error:
                raise VerificationError(f"{_name(layout)} could not be run: {str(error).strip()}") from None


def _export(folder: Path, output: Path) -> Path:
    from export_hf import ExportConfig, convert

    convert(ExportConfig(input=folder, output=output))
    return output


def _run_original(config: ReferenceConfig, timeout: float) -> None:
    command = [sys.executable, str(REFERENCE), "--input", *map(str, config.input)]
    command += ["--checkpoint", str(config.checkpoint), "--probe", str(config.probe), "--output", str(config.output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    del environment["OMP_NUM_THREADS"]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the original was not done after {timeout:.0f} seconds; --timeout allows more") from None
    if result.returncode == EXIT_USAGE:
        raise ValueError(result.stderr.strip().splitlines()[-1].removeprefix(f"{REFERENCE.name}: "))
    if result.returncode:
        raise VerificationError(f"the original could not be run: {result.stderr.strip()}")


def _name(layout: ParallelConfig) -> str:
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    return f"tensor parallel size {tensor}, pipeline parallel size {pipeline}"


def describe(outcome: Outcome, tolerance: float) -> str:
    """The paragraph of a failure.

    Raises:
        AssertionError: it is none.
    """
    first = outcome.first_above(tolerance)
    assert first is not None
    return f"{first}"


def prove(config: VerifyConfig) -> list[str]:
    """Compare; returns the report.

    Raises:
        ValueError: no checkpoint, no such original, or too little memory.
        VerificationError: ours computes something else.
    """
    folder = newest(config.checkpoint)
    architecture = load_architecture(folder)
    allowed, left_out = split_layouts(architecture)
    check_memory(_num_parameters(folder, architecture))
    report = []
    for outcome in outcomes(folder, config.reference, allowed, config.timeout):
        if outcome.first_above(config.tolerance) is not None:
            raise VerificationError(describe(outcome, config.tolerance))
        worst = outcome.worst
        report.append(f"{_name(outcome.layout)}: {worst.error:.1e} at most ({worst.place}, {worst.case})")
    return report


def _num_parameters(folder: Path, architecture: Architecture) -> int:
    parts = {
        VISION_MODEL: architecture.vision,
        VISION_PROJECTION: architecture.vision_projection,
        LANGUAGE_MODEL: architecture.language,
    }
    return sum(
        len(tensor.chunks) * torch.Size(tensor.shape).numel()
        for module, part in parts.items()
        if part is not None
        for tensor in stored_tensors(folder, module).values()
    )


if __name__ == "__main__":
    sys.exit(run(VerifyConfig, prove))
