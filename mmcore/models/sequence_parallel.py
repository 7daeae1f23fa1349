"""Sequences of a length that tensor ranks can share, for sequence parallelism, and that FP8 takes.

Between attention and MLP each tensor rank holds an equal part of the sequence. What is missing to a multiple of
the ranks, or of 16 on each, is a segment of its own at the end of the row: nothing attends to it, and nothing is
trained on it. Of one that context ranks share, each has its two chunks at the end of its part of the row.

Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198.
"""

from dataclasses import replace

import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def pad_rows(embeddings: Tensor, padding: int) -> Tensor:
    """Zeros at the end of the sequence: [s, b, h] -> [s + padding, b, h]."""
    return F.pad(embeddings, (0, 0, 0, 0, 0, padding)) if padding else embeddings


def packed_segments(cu_seqlens: Tensor, longest: int) -> PackedSeqParams:
    """Segments of a row, as mcore's attention and rotary embeddings take them.

    Args:
        cu_seqlens: int32 [segments + 1], where each begins, and the end.
        longest: tokens of the longest.
    """
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def pad_segments(packed: PackedSeqParams, padding: int) -> PackedSeqParams:
    """The boundaries with the padding as a last segment."""
    if not padding:
        return packed
    assert packed.cu_seqlens_q is not None and packed.max_seqlen_q is not None
    boundaries = F.pad(packed.cu_seqlens_q, (0, 1))  # int32 [segments + 2]
    boundaries[-1] = boundaries[-2] + padding
    longest = max(packed.max_seqlen_q, padding)
    return replace(
        packed, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest
    )
