"""Which samples share a row: bins of a fixed length, filled as well as a short look ahead allows."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    """Deal samples out to rows by first fit, longest first.

    At most 11/9 of the fewest rows that there could be, and 6/9 more (Dosa, 2007, "The tight bound of
    first fit decreasing bin-packing algorithm is FFD(I) <= 11/9 OPT(I) + 6/9").

    Args:
        lengths: tokens of each sample, none above `seq_length`.
        seq_length: tokens of a row.
    Returns:
        For each row its samples' indices, in their order in `lengths`; rows by their first sample. So the
        order of a shuffled stream is kept as far as it can be.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        assert 0 < length <= seq_length, f"a sample of {length} tokens for rows of {seq_length}"
        place = next((place for place, left in enumerate(room) if left >= length), None)
        if place is None:
            rows.append([index])
            room.append(seq_length - length)
        else:
            rows[place].append(index)
            room[place] -= length
    return sorted(sorted(row) for row in rows)
