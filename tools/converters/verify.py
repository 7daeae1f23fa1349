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

import subprocess
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from checkpoint_folder import stored_tensors
from command_line import run
from conversion import VerificationError
from parity.memory import check_memory
from parity.probe import build_probe, unreached
from parity.ranks import Difference, compare
from reference import Index, ReferenceConfig, read_index
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

    def __post_init__(self) -> None:
        if not (self.tolerance > 0 and self.timeout > 0):
            raise ValueError(f"--tolerance and --timeout must be above 0, not {self.tolerance:g} and {self.timeout:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One layout's result."""

    layout: ParallelConfig
    original: Index
    """Of what ours was compared with."""
    differences: list[Difference]
    """At every place, in the order of the computation."""

    @property
    def worst(self) -> Difference:
        return max(self.differences, key=lambda difference: difference.error)

    def first_above(self, tolerance: float) -> Difference | None:
        return next((difference for difference in self.differences if difference.error > tolerance), None)


def split_layouts(architecture: Architecture) -> tuple[list[ParallelConfig], list[str]]:
    """The layouts that the architecture allows, and for each of the others why it does not."""
    allowed, reasons = [], []
    for layout in LAYOUTS:
        try:
            check_layout(architecture, layout)
            allowed.append(layout)
        except ValueError as error:
            reasons.append(f"{layout_name(layout)} left out: {error}")
    return allowed, reasons


def outcomes(
    folder: Path,
    references: Sequence[Path],
    layouts: Sequence[ParallelConfig],
    timeout: float,
    run_original: Callable[[ReferenceConfig, float], None],
) -> Generator[Outcome, None, None]:
    """Run the original, then ours layout by layout.

    Args:
        folder: checkpoint.
        references: as `VerifyConfig.reference`.
        timeout: seconds for the original, and for each layout.
        run_original: carries the first out within the second, in a process that is gone afterwards.
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
        run_original(ReferenceConfig(input=originals, checkpoint=folder, probe=probe, output=theirs), timeout)
        index = read_index(theirs)
        for layout in layouts:
            try:
                found = compare(layout, folder, probe, theirs, timeout)
            except (ProcessRaisedException, ProcessExitedException) as error:
                raise VerificationError(f"{layout_name(layout)} could not be run: {str(error).strip()}") from None
            yield Outcome(layout=layout, original=index, differences=found)


def _export(folder: Path, output: Path) -> Path:
    from export_hf import ExportConfig, convert  # with transformers: seconds that a given original does without

    convert(ExportConfig(input=folder, output=output))
    return output


def _run_original(config: ReferenceConfig, timeout: float) -> None:
    command = [sys.executable, str(REFERENCE), "--input", *map(str, config.input)]
    command += ["--checkpoint", str(config.checkpoint), "--probe", str(config.probe), "--output", str(config.output)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["HF_HUB_OFFLINE"] = "1"
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the original was not done after {timeout:.0f} seconds; --timeout allows more") from None
    if result.returncode == EXIT_USAGE:
        raise ValueError(result.stderr.split(f"{REFERENCE.name}: ", 1)[-1].strip())
    if result.returncode:
        raise VerificationError(f"the original could not be run: {result.stderr.strip()}")


def layout_name(layout: ParallelConfig) -> str:
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    return f"tensor parallel size {tensor}, pipeline parallel size {pipeline}"


def describe(outcome: Outcome, tolerance: float) -> str:
    """What a failure says: where it begins, by how much, and how far it was right."""
    first = outcome.first_above(tolerance)
    assert first is not None
    before = outcome.differences[: outcome.differences.index(first)]
    known = f"at most {max(difference.error for difference in before):.1e}" if before else "none, for it is the first"
    how_much = first.note or f"it differs by {first.error:.1e} of the largest value there"
    return (
        f"the checkpoint does not compute what {outcome.original.name} does. At {layout_name(outcome.layout)}, given "
        f"{first.case}, {first.place} is the first place that differs by more than {tolerance:.0e}: {how_much}. "
        f"Differences before it: {known}"
    )


def prove(config: VerifyConfig) -> list[str]:
    """Compare; returns the report.

    Raises:
        ValueError: no checkpoint, no such original, or too little memory.
        VerificationError: ours computes something else.
        TimeoutError: it took too long.
    """
    folder = newest(config.checkpoint)
    architecture = load_architecture(folder)
    layouts, left_out = split_layouts(architecture)
    check_memory(_num_parameters(folder, architecture))
    report: list[str] = []
    with closing(outcomes(folder, config.reference, layouts, config.timeout, _run_original)) as found:
        for outcome in found:
            if outcome.first_above(config.tolerance) is not None:
                agreed = f". These agreed: {'; '.join(report)}" if report else ""
                raise VerificationError(describe(outcome, config.tolerance) + agreed)
            worst = outcome.worst
            report.append(f"{layout_name(outcome.layout)}: {worst.error:.1e}, at {worst.place}")
    title = (
        f"computes what {outcome.original.name} does; largest difference anywhere, relative to the largest value there:"
    )
    lines = (*report, *left_out, *unreached(architecture), *outcome.original.notes)
    return [title, *(f"  {line}" for line in lines)]


def _num_parameters(folder: Path, architecture: Architecture) -> int:
    parts = {
        VISION_MODEL: architecture.vision,
        VISION_PROJECTION: architecture.vision_projection,
        LANGUAGE_MODEL: architecture.language,
    }
    tensors = [stored_tensors(folder, module) for module, part in parts.items() if part is not None]
    return sum(tensor.num_bytes // tensor.dtype.itemsize for part in tensors for tensor in part.values())


if __name__ == "__main__":
    sys.exit(run(VerifyConfig, prove))
