"""Packing against the best there is on small cases, and its fill on lengths as LLaVA's data has them."""

import itertools
import random

import pytest

from benchmarks.packing import draw_lengths, packed_fill, padded_fill
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


@pytest.mark.parametrize("seed", range(20))
def test_the_fewest_rows_where_first_fit_needs_more(seed: int) -> None:
    """Cut rows without a gap into samples: first fit seldom finds them again, and filling row by row mostly does."""
    draw = random.Random(seed)
    lengths = []
    for _ in range(30):
        cuts = sorted(draw.sample(range(1, 100), 4))
        lengths += [end - start for start, end in zip([0, *cuts], [*cuts, 100], strict=True)]
    assert len(pack(lengths, 100)) == 30


def test_the_better_of_the_two_ways() -> None:
    # First fit takes 5 + 4, then 3 + 3 + 3, and has 2 left.
    assert pack([5, 4, 3, 3, 3, 2], 10) == [[0, 2, 5], [1, 3, 4]]
    # Row by row takes 5 + 3 + 2, then 4 + 4 and 4 + 4, and has 3 left.
    assert pack([5, 4, 4, 4, 4, 3, 3, 2], 10) == [[0, 1], [2, 3, 7], [4, 5, 6]]


@pytest.mark.parametrize(
    ("seq_length", "buffer_size", "least"),
    [(2048, 512, 0.88), (4096, 256, 0.97), (8192, 256, 0.97), (4096, 512, 0.98), (8192, 512, 0.98)],
)
def test_fill(seq_length: int, buffer_size: int, least: float) -> None:
    """Rows of 2048 cannot be filled so far by anything: two samples with pictures leave room for few third ones."""
    lengths = draw_lengths(4096, seq_length)
    assert packed_fill(lengths, seq_length, buffer_size) >= least
    assert padded_fill(lengths, 16) < 0.65
