"""Image embeddings into the places that the data side kept for them."""

from torch import Tensor


def splice(text: Tensor, images: Tensor, is_image: Tensor) -> Tensor:
    """Replace the placeholder positions of `text` by image embeddings, in order.

    Args:
        text: [s, b, h], sequence-first as mcore embeds it.
        images: [n, i, h], in the order of their places in the batch.
        is_image: bool [b, s].
    Returns:
        [s, b, h].
    Raises:
        ValueError: placeholder count != image embedding count; both in the message.
    """
    places, embeddings = int(is_image.sum()), images.shape[0] * images.shape[1]
    if places != embeddings:
        raise ValueError(
            f"the batch has {places} image placeholders but {embeddings} image embeddings "
            f"({images.shape[0]} images of {images.shape[1]}): it was not laid out for this vision tower"
        )
    rows = text.transpose(0, 1)  # [b, s, h]
    rows = rows.masked_scatter(is_image.unsqueeze(-1), images.to(rows.dtype))
    return rows.transpose(0, 1).contiguous()  # [s, b, h]
