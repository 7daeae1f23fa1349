"""How much of what is computed would be padding, for each way to put samples into rows."""

import random
from collections import Counter
from collections.abc import Sequence

from mmcore.data.packing import pack

MICRO_BATCHES = (4, 16)
BUFFERS = (100, 500, 2000)

# Lengths that are looked at. The order of a run is shuffled, so more of them change the third digit.
MAX_DRAWN = 1 << 16


def draw(sources: Sequence[tuple[Counter[int], float]], seed: int = 0) -> list[int]:
    """Lengths of samples as a run meets them: of each source its share, shuffled.

    Args:
        sources: number of samples by length, and share of the draws.
    Returns:
        All lengths of a single source, or of several in the proportions of their shares; MAX_DRAWN at most.
    """
    rng = random.Random(seed)
    filled = [(counts, share) for counts, share in sources if counts and share > 0]
    whole = sum(share for _, share in filled)
    total = min(MAX_DRAWN, sum(counts.total() for counts, _ in filled))
    drawn: list[int] = []
    for counts, share in filled:
        times, rest = divmod(round(total * share / whole), counts.total())
        drawn += [length for length, count in counts.items() for _ in range(times * count)]
        drawn += rng.sample(list(counts), rest, counts=list(counts.values()))
    rng.shuffle(drawn)
    return drawn


def padding(lengths: Sequence[int], seq_length: int) -> dict[str, float]:
    """Share of positions without a token, by how samples are put into rows.

    Args:
        lengths: tokens of each sample in the order of the run, none above `seq_length`.
        seq_length: tokens of a row.
    """
    if not lengths:
        return {}
    tokens = sum(lengths)
    shares = {f"a row of {seq_length} for each sample": _share(tokens, seq_length * len(lengths))}
    for size in MICRO_BATCHES:
        batches = _cut(lengths, size)
        padded = sum(max(batch) * len(batch) for batch in batches)
        shares[f"micro batches of {size}, padded to their longest"] = _share(tokens, padded)
    for size in BUFFERS:
        num_rows = sum(len(pack(buffer, seq_length)) for buffer in _cut(lengths, size))
        shares[f"rows of {seq_length}, packed from {size} samples"] = _share(tokens, seq_length * num_rows)
    return shares


def _cut(lengths: Sequence[int], size: int) -> list[Sequence[int]]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]


def _share(tokens: int, positions: int) -> float:
    return 1 - tokens / positions
