"""Keys and values of running requests, whatever their lengths: a slot for each, and passes over all of them at once.

A pass packs one new token of every request that is there, then the whole prompts of newcomers, into one row, so that
nothing is padded. mcore's layers take the row for a sequence of its own; where each token really stands is known here
alone: its rotation and what it sees. So it works with any layers, at any tensor and pipeline parallel size.

mcore's own contexts do not fit: the static one has all requests at one length, the dynamic one needs flash-attn and a
GPU.

n requests from before, t tokens of a pass, ng key-value heads and np query heads of this rank, hn channels of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmcore import host
from mmcore.models.attention import attend, causal_mask, window
from mmcore.models.rotary import ScaledRotaryEmbedding

# Keys are looked at in multiples of this: kernels want masks of such widths.
_MULTIPLE = 16


class KeyValueCache(PackedSeqParams):
    """One for all layers of a rank; mcore carries it to each layer's attention, as it does `PackedSeqParams`."""

    def __init__(self, max_batch_size: int, max_length: int) -> None:
        """Memory is taken layer by layer in the first pass.

        Args:
            max_batch_size: slots.
            max_length: tokens in each.
        """
        super().__init__(qkv_format="sbhd")  # so that mcore leaves the row as it is
        self.shape = (max_batch_size, max_length + -max_length % _MULTIPLE)
        self.lengths: list[int] = []
        """Tokens of each request, by slot, once the pass is done."""
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values [slots, length, ng, hn]

    def free(self, slot: int) -> None:
        """Forget a request; the last one takes its slot, so that those of n requests are always the first n."""
        last = len(self.lengths) - 1
        if slot != last:
            length = self.lengths[last]
            for keys, values in self.memory.values():
                keys[slot, :length], values[slot, :length] = keys[last, :length], values[last, :length]
            self.lengths[slot] = length
        self.lengths.pop()

    def begin(self, newcomers: Sequence[int]) -> None:
        """Begin a pass over one new token of every request, by slot, and the prompts of newcomers, who take the next.

        Args:
            newcomers: lengths of their prompts.
        """
        self.num_before, self.newcomers = len(self.lengths), tuple(newcomers)
        positions = [*self.lengths, *(position for length in newcomers for position in range(length))]
        owners = [*range(self.num_before)]
        for slot, length in enumerate(newcomers, self.num_before):
            owners += [slot] * length
        self.lengths = [length + 1 for length in self.lengths] + list(newcomers)
        assert len(self.lengths) <= self.shape[0] and max(self.lengths, default=0) <= self.shape[1]
        device = host.device()
        self.positions = torch.tensor(positions, device=device)  # int64 [t]
        self.slots = torch.tensor(owners, device=device)  # int64 [t]
        self.longest = max(self.lengths[: self.num_before], default=0)
        self.longest += -self.longest % _MULTIPLE
        self.place = torch.arange(self.longest, device=device)
        self.key_angles: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """Places of each request's newest token in the row, by slot: int64 [requests]."""
        ends = torch.tensor((*[1] * self.num_before, *self.newcomers)).cumsum(0) - 1
        return ends.to(self.positions.device)

    def rotary(self, embedding: ScaledRotaryEmbedding) -> Any:
        """What mcore is to rotate by: angles [t, 1, 1, hn], of queries and keys alike.

        Frequencies may depend on the length that a request has reached (see `ScaledRotaryEmbedding`). Then mcore
        rotates the queries only, keys are kept as they are, and rotated each time that they are looked at.
        """
        rows = [embedding.frequencies(length) for length in (self.lengths if embedding.is_dynamic else [0])]
        frequencies = torch.stack(rows).to(self.positions.device)  # [requests or 1, hn / 2]
        angles = self.positions[:, None] * frequencies[self.slots if embedding.is_dynamic else 0]
        angles = torch.cat([angles, angles], dim=-1)[:, None, None]  # [t, 1, 1, hn]
        if not embedding.is_dynamic:
            return angles
        before = self.place[:, None] * frequencies[: self.num_before, None]  # [n, longest, hn / 2]
        self.key_angles = torch.cat([before, before], dim=-1)[:, :, None]  # [n, longest, 1, hn]
        self.angles = angles
        return angles, None

    def attend(self, config: TransformerConfig, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the row's keys and values, and let each token see its own request's up to itself.

        Args:
            config: the layer's, for a sliding window.
            layer: its number in the model.
            query: [t, 1, np, hn].
            key, value: [t, 1, ng, hn].
        Returns:
            [t, 1, np * hn].
        """
        keys, values = self._memory(layer, key, value)
        keys[self.slots, self.positions] = key[:, 0]
        values[self.slots, self.positions] = value[:, 0]
        old, t = self.num_before, len(query)
        contexts = [self._attend_before(query[:old, 0], keys, values, config)] if old else []
        if self.key_angles is not None and old < t:
            key = _apply_rotary_pos_emb_bshd(key, self.angles)
        parts = (part[old:, 0].transpose(0, 1).split(self.newcomers, dim=1) for part in (query, key, value))
        for segment in zip(*parts, strict=True):
            query_, key_, value_ = (part[None] for part in segment)  # [1, heads, s, hn]
            context = attend(query_, key_, value_, config.softmax_scale, **causal_mask(query_, window(config)))
            contexts.append(context[0].transpose(0, 1))
        return torch.cat(contexts).flatten(1)[:, None]  # [t, 1, np * hn]

    def _memory(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.memory:
            # Of zeros: what is hidden by a mask has the weight 0, but 0 times NaN is NaN.
            shape = (*self.shape, *key.shape[2:])
            self.memory[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        return self.memory[layer]

    def _attend_before(self, query: Tensor, keys: Tensor, values: Tensor, config: TransformerConfig) -> Tensor:
        """[n, np, hn] -> [n, np, hn]; query heads that share keys are queries of one head."""
        n, groups = len(query), keys.shape[2]
        keys, values = keys[:n, : self.longest], values[:n, : self.longest]
        if self.key_angles is not None:
            keys = _apply_rotary_pos_emb_bshd(keys, self.key_angles)
        here = self.positions[:n, None]
        seen = self.place <= here  # bool [n, longest]
        if (width := window(config)) is not None:
            seen &= self.place > here - width
        grouped = query.unflatten(1, (groups, -1))  # [n, ng, np / ng, hn]
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        return attend(grouped, keys, values, config.softmax_scale, attn_mask=seen[:, None, None]).flatten(1, 2)


def with_cache(attention: Any) -> Any:
    """An attention of mcore's that leaves to a `KeyValueCache` what that knows."""

    class WithCache(attention):
        config: TransformerConfig

        def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, layer_number, *args, **kwargs)
            self.layer = layer_number

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            cache = kwargs.get("packed_seq_params")
            if isinstance(cache, KeyValueCache):
                return cache.attend(self.config, self.layer, query, key, value)
            output: Tensor = super().forward(query, key, value, *args, **kwargs)
            return output

    return WithCache
