"""`mmcore VERB ...`: a table of verbs, each imported when it is asked for."""

import importlib
import os
import signal
import sys
import time

from mmcore.checks import nearest
from mmcore.constants import EXIT_DONE, EXIT_USAGE
from mmcore.environment import name_rank

VERBS = {
    "prepare": "turn raw pictures and conversations into an energon dataset",
    "inspect": "say what a dataset holds, and what of it would hurt a run",
    "train": "pretrain or tune a model by a recipe",
    "status": "say how a run goes, and what of it needs a person",
    "generate": "let a checkpoint caption pictures or answer questions",
    "chat": "talk with a checkpoint in the terminal",
    "serve": "let a checkpoint answer OpenAI's chat-completions protocol",
    "evaluate": "score predictions against references",
    "report": "set scored runs side by side",
}


def usage() -> str:
    rows = "\n".join(f"  {verb:10}{meaning}" for verb, meaning in VERBS.items())
    return f"usage: mmcore VERB [options]\n\n{rows}\n\n`mmcore VERB --help` lists a verb's options.\n"


def main() -> int:
    """Run one verb; what its user did wrong becomes one paragraph on stderr and exit code 2."""
    verb, *argv = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(usage(), end="")
        return EXIT_DONE
    if verb not in VERBS:
        print(f"mmcore: {verb!r} is not a verb{nearest(verb, VERBS)}; `mmcore --help` lists them", file=sys.stderr)
        return EXIT_USAGE
    name_rank()
    try:
        code = int(importlib.import_module(f"mmcore.commands.{verb}").main(argv))
        _stay_deaf()
        return code
    except ValueError as error:
        # A ValueError is the user's to mend (a fault of ours is any other exception, with its traceback).
        # What all ranks find the first one says alone: torchrun and srun send the others SIGTERM when it has ended.
        told: list[int] = []
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
            time.sleep(3)
        _stay_deaf()
        if not told:
            print(f"mmcore {verb}: {error}", file=sys.stderr)
        return EXIT_USAGE


def _stay_deaf() -> None:
    """Of several ranks the first that ends has the others sent SIGTERM, and the job's exit code would become that of a
    signal. Nor does a handler help: Python gives up all but this when it takes itself down."""
    if "RANK" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
