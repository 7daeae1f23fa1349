"""`python -m tests.faults [--full]`: the promises of checkpoints, tried one by one, and what was found.

Without --full what the other tests run, with it all of it. Other arguments go to pytest.
"""

import os
import sys
import tempfile
from pathlib import Path

from tests.faults import disk

FOLDER = Path(__file__).parent


def main() -> None:
    arguments = sys.argv[1:]
    if "--full" in arguments:
        arguments.remove("--full")
        os.environ["MMCORE_FAULTS"] = "full"
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    # All in one process whose disk fails when it is told to.
    if library := disk.build(Path(tempfile.mkdtemp())):
        os.environ["LD_PRELOAD"] = " ".join([str(library), *os.environ.get("LD_PRELOAD", "").split()])
        command.append(str(FOLDER / "events.py"))
    else:
        print("no C compiler: kills and failures at each file are left out", file=sys.stderr)
    # One by one: of a folder pytest would take what it thinks tests are, and leave events.py out.
    tests = sorted(str(path) for path in FOLDER.glob("test_*.py") if path.name != "test_events.py")
    os.execv(sys.executable, [*command, *tests])


if __name__ == "__main__":
    main()
