"""Padding, by hand."""

from collections import Counter

import pytest

from mmcore.data import padding as module
from mmcore.data.padding import draw, padding


def test_shares_by_hand() -> None:
    shares = padding([6, 2, 4, 8, 1], 8)
    assert shares == {
        "a row of 8 for each sample": pytest.approx(1 - 21 / 40),
        "micro batches of 4, padded to their longest": pytest.approx(1 - 21 / (4 * 8 + 1)),
        "micro batches of 16, padded to their longest": pytest.approx(1 - 21 / 40),
        **{f"rows of 8, packed from {size} samples": pytest.approx(1 - 21 / 24) for size in (100, 500, 2000)},
    }
    assert padding([], 8) == {}


def test_a_buffer_is_packed_by_itself() -> None:
    """100 halves and a half of the next buffer: 50 rows and one, against 51."""
    shares = padding([4] * 99 + [8, 4, 4], 8)
    assert shares["rows of 8, packed from 100 samples"] == pytest.approx(1 - 412 / (8 * 52))
    assert shares["rows of 8, packed from 500 samples"] == pytest.approx(1 - 412 / (8 * 52))
    shares = padding([5] * 100 + [3] * 100, 8)
    assert shares["rows of 8, packed from 100 samples"] == pytest.approx(1 - 800 / (8 * 150))
    assert shares["rows of 8, packed from 500 samples"] == 0


def test_one_source_is_drawn_whole() -> None:
    counts = Counter({3: 5, 7: 2})
    assert Counter(draw([(counts, 0.3)])) == counts
    assert draw([(counts, 0.3)]) == draw([(counts, 0.3)]) != sorted(counts.elements())


def test_sources_are_drawn_by_their_shares() -> None:
    drawn = Counter(
        draw([(Counter({1: 30}), 0.75), (Counter({2: 10}), 0.25), (Counter(), 0.5), (Counter({3: 9}), 0.0)])
    )
    assert drawn == {1: 30, 2: 10}
    drawn = Counter(draw([(Counter({1: 30}), 0.25), (Counter({2: 5, 3: 5}), 0.75)]))
    assert drawn == {1: 10, 2: 15, 3: 15}


def test_a_billion_samples_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DRAWN", 1000)
    drawn = Counter(draw([(Counter({10: 750_000_000, 20: 250_000_000}), 1.0)]))
    assert drawn.total() == 1000 and 700 < drawn[10] < 800
