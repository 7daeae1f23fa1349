"""Losses of a few positions at a time, so that the logits of all of them are never there at once.

In float32 the logits of 8192 positions over 32768 tokens take a gibibyte, and the softmax and its gradient one each.
Chunk by chunk none of it outlives its chunk: the backward pass computes a chunk's logits again, which costs one more
product with the output layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Of a chunk's logits in float32. Beyond some thousand rows matrix products gain nothing by more of them.
CHUNK_BYTES = 2**28


def chunk_rows(width: int) -> int:
    """Positions of a chunk.

    Args:
        width: logits of a position on this tensor rank.
    """
    return max(1, CHUNK_BYTES // (width * 4))


def in_chunks(function: Callable[[Tensor, Tensor], Tensor], rows: int, hidden: Tensor, labels: Tensor) -> Tensor:
    """`function(hidden, labels)`, which gives each row a result of its own, on at most so many rows at a time.

    Ranks that share the vocabulary have the same rows, so their sums meet in the same order, the second time too.

    Args:
        hidden: [t, h].
        labels: int64 [t].
    Returns:
        [t].
    """
    if len(hidden) <= rows:
        return function(hidden, labels)
    results = [
        # There is nothing random in it; to save the generator's state would make the host wait for the GPU.
        checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    return torch.cat(results)
