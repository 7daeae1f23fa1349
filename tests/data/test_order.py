from collections import Counter

import numpy as np
import pytest

from mmcore.data.order import BLOCK_SIZE, Draws, Order, Runs


def order(sizes: dict[int, int], times: list[float] | None = None, streams: int = 1, window: int = 50) -> Order:
    return Order(sizes, times or [1.0] * len(sizes), num_streams=streams, window=window, seed=3)


def epoch(order: Order, number: int) -> list[list[tuple[int, int]]]:
    """Of each stream, what it reads."""
    return [
        [order.at(number, stream, position) for position in range(len(order.share(number, stream)))]
        for stream in range(order.num_streams)
    ]


@pytest.mark.parametrize("window", [0, 1, 7, 5000])
@pytest.mark.parametrize("streams", [1, 3, 8])
@pytest.mark.parametrize("size", [8, 99, 1234])
def test_streams_share_an_epoch(size: int, streams: int, window: int) -> None:
    made = order({0: size}, streams=streams, window=window)
    for number in range(3):
        shares = epoch(made, number)
        assert sorted(index for share in shares for _, index in share) == list(range(size))
        assert {len(share) for share in shares} <= {size // streams, -(-size // streams)}
        assert window or [index for share in shares for _, index in share] == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    made = order({0: 1000}, streams=2)
    first, second = epoch(made, 0), epoch(made, 1)
    assert first[0] != second[0] and {index for _, index in first[0]} != {index for _, index in second[0]}
    assert first == epoch(order({0: 1000}, streams=2), 0)
    other = Order({0: 1000}, [1.0], num_streams=2, window=50, seed=4)
    assert epoch(other, 0) != first


def test_neighbours_are_read_near_each_other() -> None:
    """An object store, or a disk, is asked for stretches; yet a window holds samples from all over."""
    made = order({0: 100_000}, window=1000)
    indices = np.array([index for _, index in epoch(made, 0)[0]])
    for begin in range(0, 100_000, 1000):
        blocks = np.unique(indices[begin : begin + 1000] // BLOCK_SIZE)
        assert len(blocks) == 10 and np.ptp(blocks) > 100
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.2


def test_repetitions() -> None:
    """Of half a source every other epoch has the other half; a third of 100 is 33 or 34."""
    made = order({0: 250, 1: 500, 2: 100}, [2.0, 0.5, 1 / 3], streams=4)
    seen: Counter[tuple[int, int]] = Counter()
    for number in range(6):
        found = Counter(item for share in epoch(made, number) for item in share)
        sizes = Counter(source for source, _ in found.elements())
        assert (sizes[0], sizes[1]) == (500, 250) and sizes[2] in (33, 34)
        assert set(found.values()) <= {1, 2} and all(found[0, index] == 2 for index in range(250))
        seen += found
        if number % 2:
            assert all(seen[1, index] == (number + 1) // 2 for index in range(500))
        if number % 3 == 2:
            assert all(seen[2, index] == (number + 1) // 3 for index in range(100))


def test_parts_of_runs() -> None:
    runs = Runs(np.array([0, 1, 0]), np.array([10, 0, 5]), np.array([3, 4, 9]))
    whole = [(0, 10), (0, 11), (0, 12), (1, 0), (0, 5), (0, 6), (0, 7), (0, 8), (0, 9)]
    assert [runs.at(position) for position in range(len(runs))] == whole
    for begin in range(10):
        for end in range(begin, 10):
            part = runs.part(begin, end)
            assert [part.at(position) for position in range(len(part))] == whole[begin:end]


def test_a_billion_samples_take_little_memory() -> None:
    made = order({0: 1_000_000_000}, streams=64, window=1000)
    share = made.share(0, 63)
    assert sum(len(made.share(0, stream)) for stream in range(64)) == 1_000_000_000
    assert sum(array.nbytes for array in share) < 1_000_000
    assert 0 <= made.at(0, 63, len(share) - 1)[1] < 1_000_000_000


def test_draws_by_weight() -> None:
    draws = Draws([3.0, 1.0, 0.0], seed=1, stream=0)
    drawn = [draws.at(draw) for draw in range(20_000)]
    assert Counter(drawn)[0] == pytest.approx(15_000, rel=0.02) and 2 not in drawn
    again = Draws([3.0, 1.0, 0.0], seed=1, stream=0)
    assert [again.at(draw) for draw in range(19_999, 18_000, -1)] == drawn[19_999:18_000:-1]
    assert [Draws([3.0, 1.0, 0.0], seed=1, stream=1).at(draw) for draw in range(100)] != drawn[:100]
