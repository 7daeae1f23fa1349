"""Which samples share a row: bins of a fixed length, filled as well as a short look ahead allows."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    """Deal samples out to rows: filled one after the other, or by first fit, whichever needs fewer rows.

    The first is better where rows hold many samples, the second where they hold two or three. Hence at most
    11/9 of the fewest rows that there could be, and 6/9 more (Dosa, 2007, "The tight bound of first fit
    decreasing bin-packing algorithm is FFD(I) <= 11/9 OPT(I) + 6/9").

    Args:
        lengths: tokens of each sample, none above `seq_length`.
        seq_length: tokens of a row.
    Returns:
        For each row its samples' indices, in their order in `lengths`; rows by their first sample. So the
        order of a shuffled stream is kept as far as it can be.
    """
    for length in lengths:
        assert 0 < length <= seq_length, f"a sample of {length} tokens for rows of {seq_length}"
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    candidates = (fill(longest_first, lengths, seq_length) for fill in (_by_first_fit, _row_by_row))
    return sorted(sorted(row) for row in min(candidates, key=len))


def _by_first_fit(order: Sequence[int], lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((place for place, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            rows.append([])
            room.append(seq_length)
            place = -1
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def _row_by_row(order: Sequence[int], lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    """Each row is the longest sample that is left, and of the others those that fill it best.

    Source: Gupta and Ho, 1999, "A new heuristic algorithm for the one-dimensional bin-packing problem"
    (minimum bin slack); the best filling by dynamic programming here.
    """
    rows = []
    left = list(order)
    while left:
        first, *others = left
        row = {first, *_best_filling(others, lengths, seq_length - lengths[first])}
        rows.append(list(row))
        left = [index for index in others if index not in row]
    return rows


def _best_filling(order: Sequence[int], lengths: Sequence[int], room: int) -> list[int]:
    """Samples that leave the least of `room`, of the first that do."""
    # Bit n: some of the samples so far are n tokens together.
    sums = [1]
    for index in order:
        if sums[-1] >> room:
            break
        sums.append(sums[-1] | (sums[-1] << lengths[index] & ((2 << room) - 1)))
    filled = sums[-1].bit_length() - 1
    chosen = []
    for index, before in reversed(list(zip(order, sums[:-1], strict=False))):
        if not before >> filled & 1:
            chosen.append(index)
            filled -= lengths[index]
    return chosen
