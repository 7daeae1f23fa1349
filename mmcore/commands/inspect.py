"""`mmcore inspect DATASET --checkpoint DIR`: what a dataset holds, and what of it would hurt a run.

Of the checkpoint only model.json and tokenizer/ are read: they suffice before any weight is there.
"""

import os
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mmcore.config import DataConfig
from mmcore.constants import EXIT_DONE, EXIT_FAULT, TOKENIZER_DIR
from mmcore.models.architecture import Architecture, load_architecture, newest, with_image_mode

if TYPE_CHECKING:
    from mmcore.data.inspection import Plan
    from mmcore.data.tally import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig:
    """Lay out and decode every sample as training will, and say what would hurt a run.

    Exits with 1 if something would: samples or pictures that are broken, missing or cut, nothing to
    train, token ids that the model has not, keys that stand twice.
    """

    dataset: tyro.conf.Positional[str]
    """Energon dataset that `mmcore prepare` wrote, or an energon metadataset YAML."""
    checkpoint: Path
    """Folder that combine.py or mmcore train wrote; model.json and tokenizer/ are all that is read."""
    split: str = "train"
    """Part of the dataset."""
    conversation: str = ""
    """Template that turns a conversation into tokens; the checkpoint's if empty, "plain" for alignment."""
    image_mode: Literal["", "crop", "pad", "squash"] = ""
    """What becomes of a picture that is not square; as the checkpoint says if empty."""
    seq_length: int = DataConfig().seq_length
    """Longest sequence in tokens, image embeddings included."""
    max_longer: float = 0.01
    """Largest fraction of samples that may be longer; more would hurt."""
    num_readers: int = 1
    """Data parallel ranks times loader workers of the run: it needs a sample for each."""
    max_samples: int | None = None
    """Look at so many samples only, evenly spread; all if left out."""
    decode: bool = True
    """Decode every picture, which is what finds broken ones; else only their headers are read."""
    show: int = 0
    """Samples to look at in the page, chosen by chance."""
    show_key: tuple[str, ...] = ()
    """Keys of samples to look at."""
    seed: int = 0
    """Of the choice of samples to show."""
    output: Path | None = None
    """Folder for report.json and report.html; by default the report is only printed."""
    workers: int | None = None
    """Processes; one for each CPU if left out."""

    def __post_init__(self) -> None:
        for name in ("seq_length", "num_readers", "max_samples", "workers"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if not 0 <= self.max_longer <= 1:
            raise ValueError(f"--max-longer is a fraction between 0 and 1, not {self.max_longer}")
        if self.show < 0:
            raise ValueError(f"--show must not be negative, but is {self.show}")
        if (self.show or self.show_key) and self.output is None:
            raise ValueError("--show and --show-key need a page to show samples in: give --output, a folder for it")


def main(argv: list[str]) -> int:
    """Print the report, write it where it is wanted, and say by the exit code whether all is well."""
    config = tyro.cli(InspectConfig, prog="mmcore inspect", args=argv)
    source = newest(config.checkpoint)
    architecture = load_architecture(source)
    if architecture.vision is None or architecture.language is None or architecture.image_token_id is None:
        raise ValueError(f"{source} is one tower of a model: join it with the other by tools/converters/combine.py")
    architecture = with_image_mode(architecture, config.image_mode)
    if config.conversation:
        architecture = replace(architecture, conversation=config.conversation)
    from concurrent.futures import BrokenExecutor

    try:
        report = inspect(config, architecture, source / TOKENIZER_DIR)
    except BrokenExecutor:
        print("mmcore inspect: a worker was killed, maybe for want of memory: try fewer --workers", file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt:
        print("mmcore inspect: interrupted; nothing was written", file=sys.stderr)
        return EXIT_FAULT
    return EXIT_DONE if report["passed"] else EXIT_FAULT


def inspect(config: InspectConfig, architecture: Architecture, tokenizer: Path) -> dict[str, Any]:
    """Look at the samples, print what was found, and write it."""
    from rich.console import Console

    from mmcore.data.findings import report as build_report
    from mmcore.evaluation.inspection_page import write_page
    from mmcore.evaluation.inspection_table import print_report
    from mmcore.evaluation.scores import write_json

    plan = build_plan(config, architecture, tokenizer)
    tallies = look(config, plan)
    report = build_report(plan, tallies, max_longer=config.max_longer, num_readers=config.num_readers)
    shown = samples_to_show(config, plan, tallies)
    print_report(report, Console())
    if config.output:
        write_json(config.output / "report.json", report)
        write_page(config.output / "report.html", report, shown)
        print(f"report: {config.output / 'report.html'} and report.json")
    return report


def build_plan(config: InspectConfig, architecture: Architecture, tokenizer: Path) -> "Plan":
    from mmcore.data.dataset import open_dataset
    from mmcore.data.inspection import Plan
    from mmcore.data.pictures import Pictures

    assert architecture.language is not None
    total = sum(map(len, open_dataset(config.dataset, config.split).sources))
    return Plan(
        path=config.dataset,
        split=config.split,
        tokenizer=tokenizer,
        conversation=architecture.conversation,
        pictures=Pictures(**architecture.picture_options()),
        seq_length=config.seq_length,
        vocab_size=architecture.language.padded_vocab_size,
        num_samples=min(config.max_samples or total, total),
        decode=config.decode,
        wanted=frozenset(config.show_key),
    )


def look(config: InspectConfig, plan: "Plan") -> "list[Tally]":
    """Inspect with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from mmcore.data.inspection import inspect

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("samples", total=plan.num_samples)
        workers = config.workers or len(os.sched_getaffinity(0))
        return inspect(plan, workers=workers, on_progress=lambda count: progress.advance(task, count))


def samples_to_show(config: InspectConfig, plan: "Plan", tallies: "list[Tally]") -> list[dict[str, Any]]:
    """Those that are named, then some by chance.

    Raises:
        ValueError: a key is none of the samples'.
    """
    from mmcore.data.shown import show

    named = {key: number for tally in tallies for key, number in tally.wanted.items()}
    if missing := [key for key in config.show_key if key not in named]:
        raise ValueError(f"no sample that was looked at has the key --show-key {missing[0]}: see the report's examples")
    chosen = random.Random(config.seed).sample(range(plan.num_samples), min(config.show, plan.num_samples))
    numbers = dict.fromkeys([*(named[key] for key in config.show_key), *sorted(chosen)])
    return [show(plan, number) for number in numbers]
