"""The gate of verify.py for tests: the same comparison, without the seconds that new processes take to import."""

from contextlib import closing
from pathlib import Path

import reference
import verify
from torch.multiprocessing import start_processes

from mmcore.models.architecture import load_architecture

# Stricter than the command's 1e-4, which the two kinds of GELU keep: small models agree to 2e-6.
TOLERANCE = 2e-5


def check(checkpoint: Path, *references: Path) -> float:
    """Assert that a checkpoint computes what its original does, at TP 1, 2, 4 and PP 1, 2.

    The model needs 4 layers, and heads, groups and widths that 4 divides.

    Returns:
        The largest difference of all places, relative to the largest value there.
    """
    allowed, left_out = verify.split_layouts(load_architecture(checkpoint))
    assert not left_out, left_out
    worst = 0.0
    with closing(verify.outcomes(checkpoint, references, allowed, 120.0, run_original)) as outcomes:
        for outcome in outcomes:
            assert outcome.first_above(TOLERANCE) is None, verify.describe(outcome, TOLERANCE)
            worst = max(worst, outcome.worst.error)
    return worst


def run_original(config: reference.ReferenceConfig, timeout: float) -> None:
    """In a child, which takes the threads that transformers reads weights with along when it ends."""
    context = start_processes(_record, (config,), nprocs=1, join=False, start_method="fork")
    assert context is not None
    try:
        assert context.join(timeout), f"the original was not done after {timeout} seconds"
    finally:
        context.processes[0].kill()
        context.processes[0].join()


def _record(_: int, config: reference.ReferenceConfig) -> None:
    reference.record(config)
