"""How much of a score is chance: bootstrap intervals of any metric, and a paired test of two runs.

A metric is a function of sums over the samples (an accuracy of the right ones and of all, F1 of four counts, BLEU of
its n-grams), so drawing samples anew is weighing the rows of a table. Source: Efron and Tibshirani, An Introduction
to the Bootstrap (1993), chapters 13 (percentile intervals) and 15 (permutation tests).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

NUM_DRAWS = 1000
LEVEL = 0.95
FEW = 20  # where so many samples are alike on average, the alike ones are drawn together, which is much faster
CHUNK = 1 << 22  # signs that are drawn at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """A metric as a function of sums over what can be drawn anew: samples, or groups of them that belong together."""

    rows: "Sequence[Sequence[float]] | np.ndarray"
    """[n, k]; numbers of each sample."""
    value: "Callable[[np.ndarray], np.ndarray]"
    """Of the sums over samples, float64 [..., k] -> [...]."""


def mean(values: Sequence[float], scale: float = 100.0) -> Statistic:
    """Of one value a sample, such as 1 for right and 0 for wrong; times `scale`."""
    return Statistic(rows=[(value, 1.0) for value in values], value=lambda sums: scale * sums[..., 0] / sums[..., 1])


def interval(statistic: Statistic) -> tuple[float, float] | None:
    """The range in which 95 of 100 draws of as many samples have the metric; the same one each time.

    Draws that leave a metric undefined (of no sample of some kind, say) are passed over; None if all of them do.
    """
    import numpy as np

    rows = np.asarray(statistic.rows, dtype=np.float64)
    random, count = np.random.default_rng(0), len(rows)
    kinds, sizes = np.unique(rows, axis=0, return_counts=True)
    if len(kinds) < count / FEW:
        sums = random.multinomial(count, sizes / count, size=NUM_DRAWS) @ kinds  # [draws, k]
    else:
        drawn = (random.integers(0, count, count, dtype=np.int32) for _ in range(NUM_DRAWS))
        sums = np.stack([np.bincount(indices, minlength=count) @ rows for indices in drawn])
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic.value(sums)  # [draws]
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """How often chance alone makes two runs differ in their mean as much as they do, or more: two-sided.

    Each sample's two values are swapped or not, 10000 times, or in all ways where those are fewer.

    Args:
        first, second: values of the same samples, in the same order.
    """
    import numpy as np

    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    observed = abs(differences.sum()) * (1 - 1e-12)
    if len(differences) <= 13:
        signs = 1 - 2 * ((np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences))) & 1)
        return float((abs(signs @ differences) >= observed).mean())
    random, draws, extreme = np.random.default_rng(0), 10 * NUM_DRAWS, 0
    sizes, counts = np.unique(abs(differences), return_counts=True)
    if len(sizes) < len(differences) / FEW:
        sums = (2 * random.binomial(counts, 0.5, size=(draws, len(counts))) - counts) @ sizes
        return (int((abs(sums) >= observed).sum()) + 1) / (draws + 1)
    at_once = max(1, CHUNK // len(differences))
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        signs = random.integers(0, 2, size=(count, len(differences)), dtype=np.int8) * 2 - 1
        extreme += int((abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (draws + 1)
