"""Histograms' numbers, by hand."""

from collections import Counter
from itertools import pairwise

import pytest

from mmcore.data.findings import MAX_BINS, distribution


def test_a_distribution_by_hand() -> None:
    told = distribution(Counter({1: 90, 3: 9, 40: 1}))
    assert told["mean"] == pytest.approx((90 + 27 + 40) / 100)
    assert told["percentiles"] == {"0": 1, "10": 1, "50": 1, "90": 1, "99": 3, "100": 40}
    assert told["bins"][:2] == [[0, 1, 90], [2, 3, 9]] and told["bins"][-1] == [40, 41, 1]
    assert [first for first, _, _ in told["bins"]] == list(range(0, 42, 2))
    assert distribution(Counter()) == {"mean": None, "percentiles": {}, "bins": []}
    assert distribution(Counter({0: 7}))["bins"] == [[0, 0, 7]]


@pytest.mark.parametrize("lowest", [0, 1, 99, 12345])
@pytest.mark.parametrize("span", [1, 2, 23, 24, 25, 46, 1000, 99999])
def test_bins_hold_everything_once_and_are_few(lowest: int, span: int) -> None:
    counts = Counter({lowest: 2, lowest + span // 2: 3, lowest + span - 1: 4})
    bins = distribution(counts)["bins"]
    assert len(bins) <= MAX_BINS and sum(count for *_, count in bins) == counts.total()
    assert all(before[1] + 1 == after[0] for before, after in pairwise(bins))
    assert bins[0][0] <= lowest <= bins[0][1] and bins[-1][0] <= lowest + span - 1 <= bins[-1][1]
