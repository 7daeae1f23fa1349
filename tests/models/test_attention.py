"""CoreAttention against a few lines of softmax, and packed against one by one."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from mmcore.models.attention import CoreAttention


def attention(mask: AttnMaskType) -> CoreAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0
    )
    return CoreAttention(config, 1, mask, "self")


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """[sq, b, np, hn] and [sk, b, ng, hn]; hidden broadcasts to [b, np, sq, sk], True where not seen."""
    repeat = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    scores = torch.einsum("qbnh,kbnh->bnqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bnqk,kbnh->qbnh", weights, value).flatten(2)


def qkv(sq: int, sk: int, b: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(sq, b, 4, 8), torch.randn(sk, b, 2, 8), torch.randn(sk, b, 2, 8)


def test_causal() -> None:
    query, key, value = qkv(5, 5)
    expected = by_hand(query, key, value, torch.ones(5, 5, dtype=torch.bool).triu(1))
    torch.testing.assert_close(attention(AttnMaskType.causal)(query, key, value, None), expected)


def test_bidirectional() -> None:
    query, key, value = qkv(5, 5)
    expected = by_hand(query, key, value, torch.zeros(5, 5, dtype=torch.bool))
    torch.testing.assert_close(attention(AttnMaskType.no_mask)(query, key, value, None), expected)


def test_newest_query_sees_the_whole_cache() -> None:
    query, key, value = qkv(1, 7)
    expected = by_hand(query, key, value, torch.zeros(1, 7, dtype=torch.bool))
    torch.testing.assert_close(attention(AttnMaskType.causal)(query, key, value, None), expected)


def test_explicit_mask() -> None:
    query, key, value = qkv(5, 5)
    hidden = torch.ones(2, 1, 5, 5, dtype=torch.bool).triu(1)
    hidden[1, :, 2:, :2] = True
    expected = by_hand(query, key, value, hidden)
    torch.testing.assert_close(attention(AttnMaskType.causal)(query, key, value, hidden), expected)


@pytest.mark.parametrize("mask", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_packed_never_crosses_sequences(mask: AttnMaskType) -> None:
    lengths = [3, 1, 6]
    query, key, value = (part.squeeze(1) for part in qkv(10, 10, b=1))
    for part in (query, key, value):
        part.requires_grad_()
    bounds = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=6, max_seqlen_kv=6
    )
    together = attention(mask)(query, key, value, None, packed_seq_params=packed)
    pieces = zip(*(part.split(lengths) for part in (query, key, value)), strict=True)
    alone = torch.cat([attention(mask)(*(part[:, None] for part in piece), None)[:, 0] for piece in pieces])
    torch.testing.assert_close(together, alone)
    weights = torch.randn_like(alone)
    gradients = [
        torch.autograd.grad((out * weights).sum(), (query, key, value), retain_graph=True) for out in (together, alone)
    ]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
