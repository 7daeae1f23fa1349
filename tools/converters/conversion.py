"""What every converter does once its plan stands: print it or carry it out, whole or not at all."""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import megatron_format
from checkpoint_folder import StoredTensor, new_folder, write_checkpoint
from parity.memory import check_memory
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from weight_files import sha256
from weight_map import Dtype, plan

from mmcore.constants import MODEL_FILE, TOKENIZER_DIR
from mmcore.models.architecture import Architecture, save_architecture

VERIFY = Path(__file__).with_name("verify.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """Where a checkpoint goes, and how."""

    output: Path
    """Folder to write: model.json, a checkpoint, tokenizer/."""
    format: Literal["torch_dist", "megatron"] = "torch_dist"
    """torch_dist loads at any layout; megatron is cut for one, as Megatron-LM's multimodal example loads it."""
    tensor_model_parallel_size: int = 1
    """Tensor ranks of --format megatron."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages of --format megatron."""
    verify: bool = False
    """Compare with the original library in fp32, at tensor parallel sizes 1, 2, 4 and pipeline sizes 1, 2."""
    dry_run: bool = False
    """Check everything and print the plan, tensor by tensor; write nothing."""
    overwrite: bool = False
    """Replace a checkpoint that is at the output."""

    def __post_init__(self) -> None:
        layout = (self.tensor_model_parallel_size, self.pipeline_model_parallel_size)
        if min(layout) < 1:
            raise ValueError(
                f"--tensor-model-parallel-size and --pipeline-model-parallel-size are at least 1, not {layout}"
            )
        if self.format == "torch_dist" and layout != (1, 1):
            raise ValueError("a torch_dist checkpoint loads at any layout: sizes are for --format megatron")
        if self.format == "megatron" and self.verify:
            raise ValueError("--verify compares torch_dist checkpoints: run it without --format megatron")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConverterConfig(OutputConfig):
    """What the converters of single models have in common."""

    input: Path
    """Weights to convert."""
    dtype: Dtype = "keep"
    """What to store the weights as; "keep" is as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A plan: all is checked, nothing is written."""

    architecture: Architecture
    tensors: dict[str, StoredTensor]
    dropped: Counter[str]
    """How many tensors of the source each reason left out."""
    files: tuple[Path, ...]
    """Weights that are read, whose hashes model.json keeps."""
    tokenizer: tuple[Path, ...] = ()
    """Files that go along."""
    references: tuple[Path, ...] = ()
    """What --verify compares with, as verify.py takes it; the checkpoint's own export if empty."""
    notes: tuple[str, ...] = ()
    """Lines of the report."""


def carry_out(config: OutputConfig, conversion: Conversion, *inputs: Path) -> list[str]:
    """Write the checkpoint, or print what would be written.

    Args:
        inputs: what was read; the output must not replace it.
    Returns:
        Lines that tell what was done.
    Raises:
        ValueError: the output is taken, or the layout does not fit.
        VerificationError: the checkpoint does not compute what the original does. Nothing is left of it.
    """
    if config.format == "megatron":
        megatron_format.check(conversion.architecture, config)
        conversion = megatron_format.adapted(conversion, config)
    if config.dry_run:
        return [*plan(conversion.tensors, conversion.dropped), f"nothing was written (--dry-run); {_size(conversion)}"]
    if config.verify:
        check_memory(sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in conversion.tensors.values()))
    with new_folder(config.output, config.overwrite, *inputs) as folder:
        if conversion.tokenizer:
            (folder / TOKENIZER_DIR).mkdir()
        for path in conversion.tokenizer:
            shutil.copy(path, folder / TOKENIZER_DIR)
        with ThreadPoolExecutor(1) as hashing:  # beside the conversion, which mostly waits for the disk
            hashes = [(path, hashing.submit(sha256, path)) for path in conversion.files]
            total = sum(tensor.num_bytes for tensor in conversion.tensors.values())
            with progress_bar("writing", total) as on_bytes:
                if config.format == "megatron":
                    megatron_format.write(folder, conversion.architecture, conversion.tensors, config, on_bytes)
                else:
                    write_checkpoint(folder, conversion.tensors, on_bytes)
            sources = tuple({"file": path.name, "sha256": digest.result()} for path, digest in hashes)
        known = conversion.architecture.sources
        save_architecture(replace(conversion.architecture, sources=(*known, *sources)), folder)
        proof = verify(folder, *conversion.references) if config.verify else []
    return [
        f"wrote {config.output}: {_size(conversion)}",
        *(f"  left out {count}: {reason}" for reason, count in sorted(conversion.dropped.items())),
        *(f"  {note}" for note in conversion.notes),
        *(f"  {line}" for line in proof),
    ]


class VerificationError(Exception):
    """What was written does not compute what the original does."""


def verify(checkpoint: Path, *references: Path) -> list[str]:
    """Run verify.py.

    Returns:
        Its report.
    Raises:
        VerificationError: it found a difference, or could not be run.
    """
    command = [sys.executable, str(VERIFY), "--checkpoint", str(checkpoint)]
    if references:
        command += ["--reference", *map(str, references)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            report, errors = process.communicate()
        except BaseException:
            process.terminate()  # not killed: it has ranks to end and files to remove
            raise
    if process.returncode:
        raise VerificationError((errors or report).strip())
    return report.splitlines()


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, speed and time left, on a terminal; yields what moves it on."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _size(conversion: Conversion) -> str:
    megabytes = sum(tensor.num_bytes for tensor in conversion.tensors.values()) / 1e6
    return f"{len(conversion.tensors)} tensors, {megabytes:.1f} MB"


def checkpoint_input(path: Path) -> Path:
    """Raise a ValueError unless `path` is a checkpoint of ours."""
    if not (path / MODEL_FILE).is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {MODEL_FILE}")
    return path
