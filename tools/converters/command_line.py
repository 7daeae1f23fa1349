"""What all converters do around their work: options, errors, exit codes."""

import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

import tyro
from checkpoint_folder import StoredTensor

from mmcore.constants import EXIT_DONE, EXIT_FAULT, EXIT_USAGE

Config = TypeVar("Config")


def run(kind: type[Config], convert: Callable[[Config], list[str]]) -> int:
    """Parse the command line into `kind`, convert, print the report.

    Returns:
        The exit code. A ValueError is the user's to mend and an OSError the machine's; both become one
        paragraph on stderr. Anything else is our fault and keeps its traceback.
    """
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _leave)
    try:
        report = convert(tyro.cli(kind, prog=name, config=(tyro.conf.FlagCreatePairsOff,)))
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_FAULT
    print("\n".join(report))
    return EXIT_DONE


def _leave(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that what is half-written is removed on the way out."""
    raise SystemExit(128 + number)


def summary(output: Path, tensors: dict[str, StoredTensor], dropped: Counter[str]) -> list[str]:
    """Lines that count what was written and what was left out, and why."""
    megabytes = sum(tensor.num_bytes for tensor in tensors.values()) / 1e6
    return [
        f"wrote {output}: {len(tensors)} tensors, {megabytes:.1f} MB",
        *(f"  left out {count}: {reason}" for reason, count in sorted(dropped.items())),
    ]
