"""In place of `python`, for `-m mmcore ...`: steps and saves that take as long as they do at full size.

STEP_SECONDS is slept in every step: one number for each start of the job, of which the last counts on. SAVE_SECONDS is
slept in every save, where what it has written is brought to the disk, on the main rank.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from mmcore import checkpoint_files
from mmcore.__main__ import main
from mmcore.training import loop

train_step, publish = loop.train_step, checkpoint_files.publish
paces = [float(seconds) for seconds in os.environ.get("STEP_SECONDS", "0").split()]
pace = paces[min(int(os.environ.get("SLURM_RESTART_COUNT", 0)), len(paces) - 1)]


def slow_step(*arguments: Any) -> Any:
    time.sleep(pace)
    return train_step(*arguments)


def slow_publish(folder: Path, final: Path) -> None:
    time.sleep(float(os.environ.get("SAVE_SECONDS", 0)))
    publish(folder, final)


loop.train_step, checkpoint_files.publish = slow_step, slow_publish
sys.argv = sys.argv[2:]
sys.exit(main())
