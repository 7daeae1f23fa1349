"""Scaled dot-product attention for the local spec, over torch's fused kernels.

Megatron-core's own `DotProductAttention` refuses packed sequences and materialises the scores.

s sequence (sq of the queries, sk of the keys), t tokens of all packed sequences, b batch,
np query heads and ng key-value heads of this rank, hn channels of a head.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class CoreAttention(MegatronModule):
    """Drop-in for `DotProductAttention` and, where they overlap, for `TEDotProductAttention`.

    Grouped queries, causal, bidirectional and sliding-window masks, packed sequences. Tokens that come one by one are
    the matter of `mmcore.models.cache`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0, "attention dropout is not part of these models"
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.window = window(config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, np, hn], or [t, np, hn] when packed.
            key, value: [s, b, ng, hn], or [t, ng, hn] when packed.
            attention_mask: bool [b, 1, s, s], True where a key must not be seen; when given it
                is the whole mask. No row may be all True: its softmax has no value.
            attn_mask_type: not used: without attention_mask the layer's own holds.
            packed_seq_params: boundaries of packed sequences; attention never crosses them. Under context parallelism
                those of the whole row, of which this rank has the part that `mmcore.data.context` says.
        Returns:
            [s, b, np * hn], or [t, np * hn] when packed.
        """
        assert attention_bias is None
        if packed_seq_params is not None:
            is_cut = self.config.context_parallel_size > 1
            return (self._cut if is_cut else self._packed)(query, key, value, packed_seq_params)
        assert self.config.context_parallel_size == 1, "context parallelism is for packed sequences"
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, heads, s, hn]
        if attention_mask is not None:
            context = attend(query, key, value, self.softmax_scale, attn_mask=~attention_mask)
        else:
            context = attend(query, key, value, self.softmax_scale, **self._mask(query))
        return context.permute(2, 0, 1, 3).flatten(2)  # [s, b, np * hn]

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        assert packed.cu_seqlens_q is not None and torch.equal(packed.cu_seqlens_q, packed.cu_seqlens_kv)
        lengths = packed.cu_seqlens_q.diff().tolist()
        segments = zip(*(part.transpose(0, 1).split(lengths, dim=1) for part in (query, key, value)), strict=True)
        contexts = []
        for segment in segments:
            query_, key_, value_ = (part[None] for part in segment)  # [1, heads, s, hn]
            contexts.append(attend(query_, key_, value_, self.softmax_scale, **self._mask(query_))[0])
        return torch.cat(contexts, dim=1).transpose(0, 1).flatten(1)  # [t, np * hn]

    def _cut(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """This rank's positions against the keys of all ranks, which are gathered, each sequence's in its order."""
        assert packed.cu_seqlens_q is not None and self.attn_mask_type == AttnMaskType.causal and self.window is None
        group = get_context_parallel_group()
        size, rank = group.size(), group.rank()
        lengths = (packed.cu_seqlens_q.diff() // size).tolist()
        gathered = (gather_from_sequence_parallel_region(part, group=group) for part in (key, value))
        keys, values = (part.unflatten(0, (size, -1)).split(lengths, dim=1) for part in gathered)  # [rank, t / rank]
        contexts = []
        for query_, key_, value_ in zip(query.split(lengths), keys, values, strict=True):
            chunk = len(query_) // 2
            place = torch.arange(len(query_), device=query.device)
            position = place + torch.where(place < chunk, rank, 2 * size - 2 - rank) * chunk
            seen = position[:, None] >= torch.arange(len(query_) * size, device=query.device)  # [sq, sk]
            key_, value_ = (_in_order(part).transpose(0, 1)[None] for part in (key_, value_))  # [1, ng, sk, hn]
            query_ = query_.transpose(0, 1)[None]  # [1, np, sq, hn]
            contexts.append(attend(query_, key_, value_, self.softmax_scale, attn_mask=seen)[0])
        return torch.cat(contexts, dim=1).transpose(0, 1).flatten(1)  # [t, np * hn]

    def _mask(self, query: Tensor) -> dict[str, Any]:
        return causal_mask(query, self.window) if self.attn_mask_type == AttnMaskType.causal else {}


def window(config: TransformerConfig) -> int | None:
    """Tokens that a token sees, itself included; None: all before it. mcore counts those to its left alone."""
    return None if config.window_size is None else config.window_size[0] + 1


def causal_mask(query: Tensor, window: int | None) -> dict[str, Any]:
    """How torch is told that a token sees no later ones, nor those that a window has left behind.

    Args:
        query: [b, np, s, hn], as are the keys.
    """
    s = query.shape[2]
    if window is None or s <= window:
        return {"is_causal": s > 1}
    position = torch.arange(s, device=query.device)
    distance = position[:, None] - position  # [sq, sk]
    return {"attn_mask": (distance >= 0) & (distance < window)}


def attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None = None, **mask: Any) -> Tensor:
    """[b, np, sq, hn] from heads-first tensors."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, scale=softmax_scale, enable_gqa=grouped, **mask)


def _in_order(parts: Tensor) -> Tensor:
    """A sequence from what each context rank has of it: [ranks, s / ranks, ...] -> [s, ...].

    A rank has the chunk of its number, and the one of that number from the end.
    """
    early, late = parts.chunk(2, dim=1)
    return torch.cat([early.flatten(0, 1), late.flip(0).flatten(0, 1)])
