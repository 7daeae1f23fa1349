"""What leaves the data side: one sample with its sequence laid out, and a padded batch of them.

b batch, s sequence, n images (or tiles) of the whole batch, t trained tokens of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class EncodedSample:
    """One sample, final: nothing after this changes its length, labels or mask."""

    key: str
    tokens: Tensor  # int64 [s]; image_token_id once for every image embedding
    labels: Tensor  # int64 [s]; the next token, 0 where it is not trained
    loss_mask: Tensor  # float32 [s]; weight of a position in the loss
    images: Tensor  # uint8 [n, 3, h, w], in the order of their places in tokens


@dataclass(slots=True, kw_only=True)
class Batch:
    """One micro batch, padded at the right; what every rank of a model replica receives."""

    keys: list[str]
    tokens: Tensor  # int64 [b, s]; 0 where padded
    labels: Tensor  # int64 [b, s]; the next token, 0 where it is not trained
    loss_mask: Tensor  # float32 [b, s]; 0 where it is not trained
    loss_positions: Tensor  # int64 [t]; where loss_mask is not 0, in the flattened [b * s]
    images: Tensor  # uint8 [n, 3, h, w]


def collate(samples: Sequence[EncodedSample]) -> Batch:
    """Pad samples to the longest of them.

    Padding stands behind the text and attention is causal, so no mask is needed.
    """
    length = max(len(sample.tokens) for sample in samples)

    def padded(name: str) -> Tensor:
        rows = [getattr(sample, name) for sample in samples]
        return torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])  # [b, s]

    loss_mask = padded("loss_mask")
    return Batch(
        keys=[sample.key for sample in samples],
        tokens=padded("tokens"),
        labels=padded("labels"),
        loss_mask=loss_mask,
        loss_positions=loss_mask.flatten().nonzero().squeeze(-1),
        images=torch.cat([sample.images for sample in samples]),
    )
