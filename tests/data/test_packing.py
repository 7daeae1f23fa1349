"""Packing against the best there is on small cases, and its fill on lengths as LLaVA's data has them."""

import itertools
import random

import pytest

from mmcore.data.packing import pack


def fewest(lengths: tuple[int, ...], seq_length: int) -> int:
    """Rows of the best packing, by trying all."""
    best = len(lengths)
    for places in itertools.product(range(len(lengths)), repeat=len(lengths) - 1):
        rows: dict[int, int] = {}
        for length, place in zip(lengths, (0, *places), strict=True):
            rows[place] = rows.get(place, 0) + length
        if max(rows.values()) <= seq_length:
            best = min(best, len(rows))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_once_and_few_rows(seed: int) -> None:
    draw = random.Random(seed)
    lengths = tuple(draw.randint(1, 10) for _ in range(6))
    rows = pack(lengths, 10)
    assert sorted(index for row in rows for index in row) == list(range(6))
    assert all(sum(lengths[index] for index in row) <= 10 for row in rows)
    assert len(rows) <= 11 / 9 * fewest(lengths, 10) + 6 / 9


def test_order_is_that_of_the_stream() -> None:
    assert pack([3, 9, 1, 4, 6], 10) == [[0], [1, 2], [3, 4]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


def test_what_fits_no_row_is_no_sample() -> None:
    with pytest.raises(AssertionError, match="11 tokens for rows of 10"):
        pack([5, 11], 10)


@pytest.mark.parametrize("seq_length", [4096, 8192])
def test_fill(seq_length: int) -> None:
    """LLaVA-665k: 576 embeddings of a picture and a conversation of some hundred tokens; two in fifteen are text.

    Rows of 2048 cannot be filled so far by anything: two such samples leave room for no third.
    """
    draw = random.Random(0)
    lengths = []
    for _ in range(1000):
        text = min(int(draw.lognormvariate(5.4, 0.6)), seq_length - 576)
        lengths.append(max(8, text) + (0 if draw.random() < 2 / 15 else 576))
    rows = pack(lengths, seq_length)
    assert sum(lengths) / (len(rows) * seq_length) >= 0.97
