"""Scaled dot-product attention for the local spec, over torch's fused kernels.

Megatron-core's own `DotProductAttention` refuses packed sequences and materialises the scores.

s sequence (sq of the queries, sk of the keys), t tokens of all packed sequences, b batch,
np query heads and ng key-value heads of this rank, hn channels of a head.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class CoreAttention(MegatronModule):
    """Drop-in for `DotProductAttention` and, where they overlap, for `TEDotProductAttention`.

    Grouped queries, causal and bidirectional masks, a key-value cache, packed sequences.
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
        assert config.context_parallel_size == 1, "context parallelism is Transformer Engine's"
        assert config.attention_dropout == 0.0, "attention dropout is not part of these models"
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale

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
            query: [sq, b, np, hn], or [t, np, hn] when packed.
            key, value: [sk, b, ng, hn], or [t, ng, hn] when packed.
            attention_mask: bool [b, 1, sq, sk], True where a key must not be seen; when given it
                is the whole mask. No row may be all True: its softmax has no value.
            attn_mask_type: causal or no_mask, used without attention_mask; the layer's own if None.
            packed_seq_params: boundaries of packed sequences; attention never crosses them.
        Returns:
            [sq, b, np * hn], or [t, np * hn] when packed.
        """
        assert attention_bias is None
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, heads, s, hn]
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        if attention_mask is not None:
            context = self._attend(query, key, value, attn_mask=~attention_mask)
        else:
            # One query is the newest of a cache: it may see every key.
            context = self._attend(query, key, value, is_causal=causal and query.shape[2] > 1)
        return context.permute(2, 0, 1, 3).flatten(2)  # [sq, b, np * hn]

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        assert packed.cu_seqlens_q is not None and torch.equal(packed.cu_seqlens_q, packed.cu_seqlens_kv)
        causal = self.attn_mask_type == AttnMaskType.causal
        lengths = packed.cu_seqlens_q.diff().tolist()
        segments = zip(*(part.transpose(0, 1).split(lengths, dim=1) for part in (query, key, value)), strict=True)
        contexts = [self._attend(*(part[None] for part in segment), is_causal=causal)[0] for segment in segments]
        return torch.cat(contexts, dim=1).transpose(0, 1).flatten(1)  # [t, np * hn]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        """[b, np, sq, hn] from heads-first tensors."""
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, scale=self.softmax_scale, enable_gqa=grouped, **mask)
