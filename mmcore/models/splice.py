"""Image embeddings into the places that the data side kept for them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def arrange(features: Tensor, newline: Tensor, sources: Tensor) -> Tensor:
    """Put features of tiles in the order of a picture's rows.

    Args:
        features: [n, i, h] of all tiles.
        newline: [h], the embedding that ends a row.
        sources: int64 [e], which of the n * i features each place takes, -1 the newline.
    Returns:
        [e, h].
    """
    rows = torch.cat([features.flatten(0, 1), newline.to(features.dtype)[None]])  # [n * i + 1, h]
    return rows[sources]  # the newline is the last, which is what -1 means


def splice(text: Tensor, images: Tensor, is_image: Tensor) -> Tensor:
    """Replace the placeholder positions of `text` by image embeddings, in order.

    Args:
        text: [s, b, h], sequence-first as mcore embeds it.
        images: [e, h], in the order of their places in the batch.
        is_image: bool [b, s].
    Returns:
        [s, b, h].
    Raises:
        ValueError: placeholder count != image embedding count; both in the message.
    """
    places = int(is_image.sum())
    if places != len(images):
        raise ValueError(
            f"the batch has {places} image placeholders but {len(images)} image embeddings: it was not laid out for "
            "this model's pictures"
        )
    rows = text.transpose(0, 1)  # [b, s, h]
    rows = rows.masked_scatter(is_image.unsqueeze(-1), images.to(rows.dtype))
    return rows.transpose(0, 1).contiguous()  # [s, b, h]


def take_part(hidden: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Give parameters that a batch has no use for a gradient of 0, where they are trained.

    Gradients are reduced while the backward pass runs, and each bucket waits for all of its parameters: one
    without a gradient would stop mcore's DDP. A pass of the vision tower over nothing would do as well,
    and cost as much as one over a picture.

    Args:
        hidden: what the loss depends on.
    Returns:
        The same.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _TakePart.apply(hidden, *trained) if trained and torch.is_grad_enabled() else hidden


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kinds = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.kinds)
        return grads[0], *zeros
