"""Image embeddings into the places that the data side kept for them."""

import torch
from torch import Tensor


def arrange(features: Tensor, newline: Tensor | None, sources: Tensor) -> Tensor:
    """Put features of tiles in the order of a picture's rows.

    Args:
        features: [n, i, h] of all tiles.
        newline: [h], the embedding that ends a row; None where rows have no such end.
        sources: int64 [e], which of the n * i features each place takes, -1 the newline.
    Returns:
        [e, h].
    """
    rows = features.flatten(0, 1)
    if newline is not None:
        rows = torch.cat([rows, newline.to(rows.dtype)[None]])  # the last, which is what -1 means
    return rows[sources]


def splice(text: Tensor, images: Tensor, positions: Tensor) -> Tensor:
    """Replace the placeholder positions of `text` by image embeddings, in order.

    The positions are given, not looked for: how many there are the host would have to wait for.

    Args:
        text: [s, b, h], sequence-first as mcore embeds it.
        images: [e, h], in the order of their places in the batch.
        positions: int64 [e], the placeholders in the flattened [b * s], in order.
    Returns:
        [s, b, h].
    Raises:
        ValueError: placeholder count != image embedding count; both in the message.
    """
    if len(positions) != len(images):
        raise ValueError(
            f"the batch has {len(positions)} image placeholders but {len(images)} image embeddings: it was not laid "
            "out for this model's pictures"
        )
    rows = text.transpose(0, 1)  # [b, s, h]
    spliced = rows.flatten(0, 1).index_copy(0, positions, images.to(rows.dtype))
    return spliced.view_as(rows).transpose(0, 1).contiguous()  # [s, b, h]
