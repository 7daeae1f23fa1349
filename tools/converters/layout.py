"""How rows of weights are ordered: the few operations that turn one layout into the other.

All are plain torch and shape-only, so that they run on meta tensors too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def keep(tensor: Tensor) -> Tensor:
    """The same on both sides."""
    return tensor


def stack_rows(*parts: Tensor) -> Tensor:
    """Put matrices below each other: gate [f, h] and up [f, h] -> [2f, h], as mcore stores a SwiGLU."""
    return torch.cat(parts)


def group_qkv(query: Tensor, key: Tensor, value: Tensor, *, num_query_groups: int) -> Tensor:
    """Fuse the projections group by group: the query heads of a group, its key, its value.

    mcore cuts the rows between tensor ranks, and this keeps every group whole on one of them. Channels
    within a head stay in place: mcore's rotation pairs them as Hugging Face's does (rotary_interleaved
    is False).

    Args:
        query: weight [heads * channels, h] or bias [heads * channels].
        key, value: likewise, with num_query_groups heads.
    Returns:
        [(heads + 2 * num_query_groups) * channels, h], or without h.
    """
    parts = [part.unflatten(0, (num_query_groups, -1)) for part in (query, key, value)]  # [g, rows of a group, h]
    return torch.cat(parts, 1).flatten(0, 1)


def group_stacked_qkv(qkv: Tensor, *, num_attention_heads: int) -> Tensor:
    """`group_qkv` of what torch's MultiheadAttention holds: [all queries; all keys; all values], 3h rows."""
    return group_qkv(*qkv.chunk(3), num_query_groups=num_attention_heads)


def pad_rows(tensor: Tensor, *, rows: int) -> Tensor:
    """Add rows of zeros at the end of a matrix: [v, h] -> [rows, h]."""
    return F.pad(tensor, (0, 0, 0, rows - len(tensor)))


def as_token(vector: Tensor) -> Tensor:
    """A vector as a sequence of one: [h] -> [1, 1, h]."""
    return vector.view(1, 1, -1)
