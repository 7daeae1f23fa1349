#!/usr/bin/env python3
"""In place of `python`, to a launcher: ends as RUN/plan says, one line for each start, and leaves mmcore train's files.

step=N     a checkpoint of that step appears
done       RUN/DONE appears
exit=N     ends with that code
kill=R     rank R is killed; the others go on with what follows
signal=S   waits for SIGTERM; then saves for S seconds: one step more, exit code 75
deaf=S     sleeps, and SIGTERM does nothing
sleep=S    sleeps, and SIGTERM ends it
"""

import os
import signal
import sys
import time
from pathlib import Path


def main(words: list[str]) -> int:
    option = "--checkpoint.save" if "--checkpoint.save" in words else "--output"
    run = Path(words[words.index(option) + 1])
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    names = os.environ if "RANK" in os.environ else {"WORLD_SIZE": os.environ.get("SLURM_NTASKS", "1")}
    records = [run / f"starts-{other}" for other in range(int(names["WORLD_SIZE"]))]
    before = records[rank].read_text() if records[rank].exists() else ""
    start = before.count("\n")
    line = (run / "plan").read_text().splitlines()[start]
    if "signal=" in line:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    elif "sleep=" not in line:  # the first rank that ends has the others ended
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    records[rank].write_text(f"{before}{os.getpid()} of {len(records)}\n")
    while not all(path.exists() and path.read_text().count("\n") > start for path in records):
        time.sleep(0.02)
    print(f"fake trainer, rank {rank}: {line}", flush=True)
    for action in line.split():
        what, _, value = action.partition("=")
        if what == "step" and rank == 0:
            (run / f"step_{int(value):08d}").mkdir()
        elif what == "done" and rank == 0:
            (run / "DONE").touch()
        elif what == "exit":
            return int(value)
        elif what == "kill" and rank == int(value):
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "signal":
            wait_and_save(run, rank, float(value))
            return 75
        elif what == "sleep":
            time.sleep(float(value))
    return 0


def wait_and_save(run: Path, rank: int, seconds: float) -> None:
    (run / f"ready-{rank}").touch()
    assert signal.sigtimedwait([signal.SIGTERM], 60), "no signal came"
    time.sleep(seconds)
    if rank == 0:
        steps = [int(folder.name.removeprefix("step_")) for folder in run.glob("step_*")]
        (run / f"step_{max(steps, default=0) + 1:08d}").mkdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
