"""LLaMA and Mistral as their makers' own programs compute them, in plain torch, for `consolidated` weights.

transformers does not read these, and a proof through our own weight map would prove nothing.

Source: LLaMA (arXiv:2302.13971) section 2.2, RoFormer (arXiv:2104.09864) section 3.4.2, Mistral 7B
(arXiv:2310.06825) section 2; what the papers leave open, as in meta-llama/llama-models
models/llama3/model.py and mistralai/mistral-inference rope.py, transformer_layers.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.models.architecture import LanguageArch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What params.json says, and what the weights' shapes say that it does not."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    channels: int
    """Of a head."""
    mlp_width: int
    vocabulary: int
    epsilon: float
    base: float
    """Of the rotation."""
    factor: float | None
    """LLaMA 3.1's stretch of the slow rotations."""
    high_freq_factor: float
    window: int | None


def read_sizes(params: dict[str, Any], shapes: dict[str, tuple[int, ...]], arch: LanguageArch) -> Sizes:
    """Sizes of a model.

    Args:
        params: content of params.json.
        shapes: of the weights.
        arch: what the converter made of them, for the one number that early params.json of LLaMA 3.2
            leave to Meta's programs: the stretch of the rotation.
    """
    # Mistral's programs know another base by default, and write the MLP's width, which Meta's do not.
    is_mistral, window = "hidden_dim" in params, params.get("sliding_window")
    default_base = 1e6 if is_mistral and window is None else 1e4
    factor = None
    if params.get("use_scaled_rope"):
        assert arch.rotary_scaling is not None
        factor = params.get("rope_scaling_factor", arch.rotary_scaling.factor)
    vocabulary, width = shapes["tok_embeddings.weight"]
    return Sizes(
        width=width,
        num_layers=params["n_layers"],
        num_heads=params["n_heads"],
        num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
        channels=params.get("head_dim") or width // params["n_heads"],
        mlp_width=shapes["layers.0.feed_forward.w1.weight"][0],
        vocabulary=vocabulary,
        epsilon=params["norm_eps"],
        base=params.get("rope_theta") or default_base,
        factor=factor,
        high_freq_factor=params.get("rope_high_freq_factor") or 4.0,
        window=window,
    )


def rotations(sizes: Sizes, length: int) -> Tensor:
    """Unit complex numbers [length, channels / 2] by which pairs of channels are multiplied."""
    radians = sizes.base ** -(torch.arange(0, sizes.channels, 2).float() / sizes.channels)
    if sizes.factor is not None:
        radians = torch.tensor([_stretched(float(speed), sizes) for speed in radians])
    angles = torch.outer(torch.arange(length).float(), radians)
    return torch.polar(torch.ones_like(angles), angles)


def _stretched(speed: float, sizes: Sizes, trained: int = 8192) -> float:
    """LLaMA 3.1: rotations that never came round in pretraining are slowed, fast ones are not."""
    assert sizes.factor is not None
    turns = trained * speed / (2 * math.pi)
    if turns < 1:
        return speed / sizes.factor
    if turns > sizes.high_freq_factor:
        return speed
    kept = (turns - 1) / (sizes.high_freq_factor - 1)
    return (1 - kept) * speed / sizes.factor + kept * speed


def rotate(heads: Tensor, by: Tensor) -> Tensor:
    """Turn neighbouring channels of [b, s, heads, channels] as the two parts of a complex number."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * by[None, :, None]).flatten(-2)


class Norm(nn.Module):
    """Division by the root of the mean square."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.empty(sizes.width)), sizes.epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt() * self.weight


class Attention(nn.Module):
    """Causal attention in which several query heads share a key and a value."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        queries, keys = sizes.num_heads * sizes.channels, sizes.num_kv_heads * sizes.channels
        self.wq = nn.Linear(sizes.width, queries, bias=False)
        self.wk = nn.Linear(sizes.width, keys, bias=False)
        self.wv = nn.Linear(sizes.width, keys, bias=False)
        self.wo = nn.Linear(queries, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sizes, length = self.sizes, x.shape[1]
        query, key, value = (
            projection(x).unflatten(-1, (-1, sizes.channels)) for projection in (self.wq, self.wk, self.wv)
        )  # [b, s, heads, channels]
        by = rotations(sizes, length)
        sharing = sizes.num_heads // sizes.num_kv_heads
        query, key = rotate(query, by), rotate(key, by).repeat_interleave(sharing, 2)
        scores = torch.einsum("bqhc,bkhc->bhqk", query, key) / sizes.channels**0.5
        ago = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (ago < 0) | (ago >= (sizes.window or length))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhc->bqhc", weights, value.repeat_interleave(sharing, 2))
        return self.wo(mixed.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.w1 = nn.Linear(sizes.width, sizes.mlp_width, bias=False)
        self.w2 = nn.Linear(sizes.mlp_width, sizes.width, bias=False)
        self.w3 = nn.Linear(sizes.width, sizes.mlp_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(sizes), Norm(sizes)
        self.feed_forward, self.ffn_norm = FeedForward(sizes), Norm(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class MetaLlama(nn.Module):
    """Tokens int64 [b, s] -> logits [b, s, vocabulary]. Parameters have the names that the weights' files have."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))
        self.norm = Norm(sizes)
        self.output = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))
