"""What leaves the data side: one sample with its sequence laid out, and a batch of them.

b samples, s tokens, n images (or tiles), t trained tokens of the whole batch.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


@dataclass(slots=True, kw_only=True)
class EncodedSample:
    """One sample, final: nothing after this changes its length, labels or mask."""

    key: str
    source: int = 0
    """Which of the blended sources it is from."""
    tokens: Tensor  # int64 [s]; image_token_id once for every image embedding
    labels: Tensor  # int64 [s]; the next token, 0 where it is not trained
    loss_mask: Tensor  # float32 [s]; weight of a position in the loss
    images: Tensor  # uint8 [n, 3, h, w], in the order of their places in tokens
    image_sources: Tensor | None = None  # int64 [e]; feature of `images` that each place takes, -1 the newline
    num_features: int = 0
    """Features of `images`, from which the next sample's sources are counted on."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """One micro batch: samples back to back in one row; what every rank of a model replica receives."""

    keys: list[str]
    sources: Tensor  # int64 [b]; which of the blended sources each sample is from
    num_sources: int
    tokens: Tensor  # int64 [1, s]
    labels: Tensor  # int64 [1, s]; the next token, 0 where it is not trained
    loss_mask: Tensor  # float32 [1, s]; 0 where it is not trained
    loss_positions: Tensor  # int64 [t]; where loss_mask is not 0
    images: Tensor  # uint8 [n, 3, h, w]; none on later pipeline stages
    num_images: Tensor  # int64 [b]; of each sample
    image_sources: Tensor | None = None  # int64 [e]; as a sample's, of all images; None: every feature in order
    image_positions: Tensor | None = None  # int64 [e]; where tokens has a placeholder; None: not looked for yet
    cu_seqlens: Tensor  # int32 [b + 1]; where each sample begins, and the end
    max_seqlen: int
    """Tokens of the longest sample."""

    def __getstate__(self) -> dict[str, Any]:
        """For the way out of a worker: all but the pictures as numpy, since each tensor would cost shared memory."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        small = {name: part.numpy() for name, part in parts.items() if isinstance(part, Tensor) and name != "images"}
        return {**parts, **small}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            setattr(self, name, torch.from_numpy(part) if isinstance(part, np.ndarray) else part)


def collate(samples: Sequence[EncodedSample], num_sources: int = 1) -> Batch:
    """Put samples one after the other: no padding; attention and positions begin anew with each."""
    lengths = [len(sample.tokens) for sample in samples]
    loss_mask = torch.cat([sample.loss_mask for sample in samples])
    return Batch(
        keys=[sample.key for sample in samples],
        sources=torch.tensor([sample.source for sample in samples]),
        num_sources=num_sources,
        tokens=torch.cat([sample.tokens for sample in samples])[None],
        labels=torch.cat([sample.labels for sample in samples])[None],
        loss_mask=loss_mask[None],
        loss_positions=loss_mask.nonzero().squeeze(-1),
        images=join_images([sample.images for sample in samples]),
        num_images=torch.tensor([len(sample.images) for sample in samples]),
        image_sources=join_image_sources(
            [sample.image_sources for sample in samples], [sample.num_features for sample in samples]
        ),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
    )


def with_image_positions(batch: Batch, image_token_id: int) -> Batch:
    """The batch with its placeholders found, while it is still the host's: on a GPU the host would wait for them."""
    return replace(batch, image_positions=(batch.tokens.flatten() == image_token_id).nonzero().squeeze(-1))


def join_images(images: Sequence[Tensor]) -> Tensor:
    """Pictures of several samples, contiguous: uint8 [n, 3, h, w].

    In a worker they are put at once into the memory that is handed to the training process.
    """
    shape = (sum(map(len, images)), *images[0].shape[1:])
    if get_worker_info() and shape[0]:
        shared = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's default_collate
        joined = torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)
    else:
        joined = torch.empty(shape, dtype=torch.uint8)
    return torch.cat(list(images), out=joined) if shape[0] else joined


def join_image_sources(sources: Sequence[Tensor | None], num_features: Sequence[int]) -> Tensor | None:
    """Sources of several samples as those of all their images together; all samples have such, or none.

    Args:
        sources: int64 [e], each counted from its own sample's first feature.
        num_features: of each sample's images.
    """
    starts = itertools.accumulate(num_features, initial=0)
    parts = [part + start * (part >= 0) for part, start in zip(sources, starts, strict=False) if part is not None]
    assert len(parts) in (0, len(sources)), "samples of two kinds of tiling"
    return torch.cat(parts) if parts else None
