"""What all converters do around their work: options, errors, exit codes."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

import tyro
from conversion import VerificationError

from mmcore.constants import EXIT_DONE, EXIT_FAULT, EXIT_USAGE

Config = TypeVar("Config")


def run(kind: type[Config], convert: Callable[[Config], list[str]]) -> int:
    """Parse the command line into `kind`, convert, print the report.

    Returns:
        The exit code. A ValueError is the user's to mend, an OSError the machine's, and a checkpoint that
        does not compute what its original does is for us to hear of; each becomes one paragraph on
        stderr. Anything else is our fault and keeps its traceback.
    """
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--dry-run | head` ends quietly
    try:
        report = convert(tyro.cli(kind, prog=name, config=(tyro.conf.FlagCreatePairsOff,)))
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (OSError, VerificationError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_FAULT
    print("\n".join(report))
    return EXIT_DONE


def _leave(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that what is half-written is removed on the way out."""
    raise SystemExit(128 + number)
