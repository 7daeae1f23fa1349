"""How rows of weights are ordered: the few rearrangements between one library's layout and another's.

Each goes both ways, so that one table imports and exports, and is plain torch and shape-only, so that
it runs on meta tensors too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """A rearrangement and its inverse, which gives back every bit."""

    name: str
    """For the plan that --dry-run prints."""
    pack: Callable[..., Tensor]
    """From the source's tensors to mcore's one."""
    unpack: Callable[[Tensor], tuple[Tensor, ...]]
    """From mcore's tensor to the source's."""


keep = Layout("as it is", lambda tensor: tensor, lambda tensor: (tensor,))

# A vector as a sequence of one: [h] <-> [1, 1, h].
as_token = Layout("as a sequence of one", lambda vector: vector.view(1, 1, -1), lambda token: (token.view(-1),))

# Matrices below each other: gate [f, h] and up [f, h] <-> [2f, h], as mcore stores a SwiGLU.
stack_rows = Layout("gate above up", lambda *parts: torch.cat(parts), lambda whole: whole.chunk(2))


def group_qkv(num_attention_heads: int, num_query_groups: int) -> Layout:
    """Fuse the projections group by group: the query heads of a group, its key, its value.

    mcore cuts the rows between tensor ranks, and this keeps every group whole on one of them. Channels
    within a head stay in place: mcore's rotation pairs them as Hugging Face's does (rotary_interleaved
    is False).

    Query [heads * channels, h] (or, of a bias, without h), key and value likewise with
    num_query_groups heads <-> [(heads + 2 * num_query_groups) * channels, h].
    """
    per_group = num_attention_heads // num_query_groups

    def pack(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [part.unflatten(0, (num_query_groups, -1)) for part in (query, key, value)]  # [g, rows of a group, h]
        return torch.cat(parts, 1).flatten(0, 1)

    def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
        heads = qkv.unflatten(0, (num_query_groups, per_group + 2, -1))  # [g, heads of a group, channels, h]
        return tuple(part.flatten(0, 2) for part in heads.split([per_group, 1, 1], dim=1))

    return Layout("query, key and value by group", pack, unpack)


def group_interleaved_qkv(num_attention_heads: int, num_query_groups: int) -> Layout:
    """`group_qkv` of queries and keys whose rotation turns channels 2i and 2i + 1 of a head together.

    Meta's and Mistral's own weights are so; mcore turns channels i and i + channels / 2, so the even
    channels of every head go before its odd ones. Values are not rotated.
    """
    grouped = group_qkv(num_attention_heads, num_query_groups)

    def pack(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return grouped.pack(_part_pairs(query, num_attention_heads), _part_pairs(key, num_query_groups), value)

    def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
        query, key, value = grouped.unpack(qkv)
        return _join_pairs(query, num_attention_heads), _join_pairs(key, num_query_groups), value

    return Layout("query, key and value by group, even channels before odd ones", pack, unpack)


def _part_pairs(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # [heads, 2, channels / 2, h] flattened


def _join_pairs(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # [heads, channels / 2, 2, h] flattened


def group_stacked_qkv(num_attention_heads: int) -> Layout:
    """`group_qkv` of what torch's MultiheadAttention holds: [all queries; all keys; all values], 3h rows."""
    grouped = group_qkv(num_attention_heads, num_attention_heads)
    return Layout(grouped.name, lambda qkv: grouped.pack(*qkv.chunk(3)), lambda qkv: (torch.cat(grouped.unpack(qkv)),))


def pad_rows(rows: int, padded_rows: int) -> Layout:
    """Rows of zeros at the end of a matrix: [rows, h] <-> [padded_rows, h]."""
    padding = padded_rows - rows
    if not padding:
        return keep
    return Layout(
        f"with {padding} rows of zeros", lambda table: F.pad(table, (0, 0, 0, padding)), lambda table: (table[:rows],)
    )
