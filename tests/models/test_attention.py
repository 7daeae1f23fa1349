"""CoreAttention against a few lines of softmax, packed against one by one, a window over the cache against whole."""

from dataclasses import replace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from mmcore.config import ParallelConfig
from mmcore.models.attention import CoreAttention
from mmcore.models.cache import KeyValueCache
from tests import ranks, tiny


def attention(mask: AttnMaskType, window: int | None = None) -> CoreAttention:
    """With `window`, a token sees that many, itself included."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
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


def unseen(length: int, window: int) -> torch.Tensor:
    """What a window and the future hide, one pair at a time."""
    hidden = torch.ones(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(max(0, query - window + 1), query + 1):
            hidden[query, key] = False
    return hidden


@pytest.mark.parametrize("window", [1, 3, 6, 7, 8, None])
def test_sliding_window(window: int | None) -> None:
    query, key, value = qkv(7, 7)
    expected = by_hand(query, key, value, unseen(7, window or 7))
    torch.testing.assert_close(attention(AttnMaskType.causal, window)(query, key, value, None), expected)
    if window is not None and window < 7:
        without = by_hand(query, key, value, unseen(7, 7))
        assert not torch.allclose(expected, without), "the window hides nothing: the test would see nothing"


def test_a_window_counts_within_packed_sequences() -> None:
    query, key, value = (part.squeeze(1) for part in qkv(10, 10, b=1))
    bounds = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=6, max_seqlen_kv=6
    )
    hidden = torch.ones(10, 10, dtype=torch.bool)
    for first, last in ((0, 3), (3, 4), (4, 10)):
        hidden[first:last, first:last] = unseen(last - first, 4)
    expected = by_hand(*(part[:, None] for part in (query, key, value)), hidden)[:, 0]
    found = attention(AttnMaskType.causal, window=4)(query, key, value, None, packed_seq_params=packed)
    torch.testing.assert_close(found, expected)


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


@torch.no_grad()
def cached_and_whole(window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [steps, v] of a model by its cache, token by token, and by the whole sequence each time."""
    language = replace(tiny.LANGUAGE, sliding_window=window)
    model = tiny.build(ParallelConfig(), arch=replace(tiny.architecture(), language=language)).eval()
    tokens = torch.randint(0, 150, (1, 12), generator=torch.Generator().manual_seed(0))
    cache, cached, whole = KeyValueCache(1, 16), [], []
    for first, last in [(0, 4), *((n, n + 1) for n in range(4, 12))]:
        cache.begin([] if first else [last])
        cached.append(model(tokens[:, first:last], positions=cache.last, inference_context=cache)[0])
        whole.append(model(tokens[:, :last])[-1])
    return torch.stack(cached), torch.stack(whole)


def test_a_window_moves_on_with_the_cache() -> None:
    cached, whole = ranks.run(cached_and_whole, ParallelConfig(), 1, 6)[0]
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    without = ranks.run(cached_and_whole, ParallelConfig(), 1, None)[0][1]
    assert not torch.allclose(whole[3:], without[3:]), "the window hides nothing: the test would see nothing"
