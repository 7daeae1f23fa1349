"""Rotary position embeddings with the frequency scalings of LLaMA 3, InternLM2 and linear interpolation.

Megatron-core's own `RotaryEmbedding` has LLaMA 3's scaling with fixed constants and no dynamic one.
"""

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from mmcore.models.architecture import LanguageArch, RotaryScaling


class ScaledRotaryEmbedding(RotaryEmbedding):
    """mcore's rotary embedding at the frequencies that the architecture asks for."""

    def __init__(self, arch: LanguageArch, use_cpu_initialization: bool = False) -> None:
        super().__init__(
            arch.kv_channels,
            rotary_percent=1.0,
            rotary_base=arch.rotary_base,
            use_cpu_initialization=use_cpu_initialization,
        )
        self.arch = arch
        self._use(arch.max_position_embeddings)

    def _use(self, length: int) -> None:
        place: Any = self.inv_freq.device
        self.inv_freq: Tensor = inverse_frequencies(self.arch, length).to(place)

    @property
    def is_dynamic(self) -> bool:
        """Whether the frequencies depend on the sequence's length."""
        return self.arch.rotary_scaling is not None and self.arch.rotary_scaling.rope_type == "dynamic"

    def frequencies(self, length: int) -> Tensor:
        """Radians per position [channels / 2] in a sequence of a length, of which only dynamic scaling asks.

        With it all tokens get the frequencies of the length that is reached, those too that came before.
        """
        return inverse_frequencies(self.arch, length) if self.is_dynamic else self.inv_freq

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [s, 1, 1, channels]."""
        if self.is_dynamic:
            self._use(max_seq_len)
        return super().get_emb(max_seq_len, offset)


def inverse_frequencies(arch: LanguageArch, length: int) -> Tensor:
    """Radians per position of every pair of channels, float32 [channels / 2].

    Args:
        length: tokens of the sequence; only dynamic scaling asks.
    Source: transformers modeling_rope_utils.py at 5.23: "linear", "dynamic", "llama3", operation by
        operation, so that the angles are equal to the bit.
    """
    scaling, channels = arch.rotary_scaling, arch.kv_channels
    base: Any = arch.rotary_base
    if scaling is not None and scaling.rope_type == "dynamic":
        base = _dynamic_base(arch, scaling.factor, length)
    frequencies = 1.0 / (base ** (torch.arange(0, channels, 2, device="cpu").float() / channels))
    if scaling is not None and scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling is not None and scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


def _dynamic_base(arch: LanguageArch, factor: float, length: int) -> Any:
    trained, channels = arch.max_position_embeddings, arch.kv_channels
    if length <= trained:
        return arch.rotary_base
    positions = torch.tensor(length, device="cpu")  # so transformers' arithmetic, which is float32 from here on
    return arch.rotary_base * (factor * positions / trained - (factor - 1)) ** (channels / (channels - 2))


def _llama3(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    trained, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > trained / low, frequencies / scaling.factor, frequencies)
    share = (trained / wavelengths - low) / (high - low)
    between = (1 - share) * stretched / scaling.factor + share * stretched
    is_between = (wavelengths >= trained / high) & (wavelengths <= trained / low)
    return torch.where(is_between, between, stretched)
