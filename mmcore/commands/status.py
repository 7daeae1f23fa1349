"""`mmcore status RUN`: how a run goes, from its folder alone, and whether anybody has to see to it."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mmcore.constants import EXIT_DONE, EXIT_FAULT
from mmcore.training.status import read_status


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    """Say how a run goes: steps, loss, speed, checkpoint, jobs and why they ended, and what needs a person."""

    run: tyro.conf.Positional[Path]
    """Its --checkpoint.save."""
    verify: bool = False
    """Read all of the newest checkpoint and compare checksums, instead of its files' sizes."""


def main(argv: list[str]) -> int:
    """Print it; exit code 1 where something needs a person."""
    config = tyro.cli(StatusConfig, args=argv, prog="mmcore status")
    from rich.console import Console

    console = Console()
    status = read_status(
        config.run, checksums=config.verify, width=min(100, console.width), ascii_only=console.options.ascii_only
    )
    print("\n".join(status.lines))
    for finding in status.findings:
        print(f"mmcore status: {finding}")
    return EXIT_FAULT if status.findings else EXIT_DONE
