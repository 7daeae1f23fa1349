"""Before any test module is imported: one thread a process, and megatron-core mended.

Ranks are forked (tests/ranks.py), and a child of a process that has started OpenMP threads hangs at
the first parallel loop.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from mmcore import host  # after the line above: torch reads the variable as it is imported

host.use_host()
