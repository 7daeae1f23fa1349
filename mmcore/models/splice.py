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
