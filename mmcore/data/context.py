"""A packed row cut for context parallelism: each rank gets an equal part of every sample.

A sample is cut into two chunks for each rank, and rank r of n takes chunks r and 2n - 1 - r: under a causal mask early
positions see little and late ones much, so that all ranks compute alike. Samples are padded at their ends, where no
trained position sees it, until they can be cut so.

It is the layout that Transformer Engine's attention counts on (thd_partition_indices_kernel in
transformer_engine/common/fused_attn/context_parallel.cu at 045b848), and so do mcore's rotary embeddings.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data.batch import Batch


def context_rows(cu_seqlens: Tensor, rank: int, size: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Which positions a rank gets.

    Args:
        cu_seqlens: int32 [b + 1], where each sample of the row begins, and the end.
        multiple: of 2 * size; what samples are padded to a multiple of.
    Returns:
        Positions in the row, int64 [padded length / size], in this rank's order; -1 is padding. And cu_seqlens of
        the whole row with the padding.
    """
    assert multiple % (2 * size) == 0
    lengths = cu_seqlens.diff()  # [b]
    padded = (lengths + multiple - 1) // multiple * multiple
    boundaries = F.pad(padded.cumsum(0), (1, 0)).to(cu_seqlens.dtype)
    own, starts = padded // size, boundaries // size  # of this rank's parts
    sample = torch.repeat_interleave(own)  # which sample each position is from
    place = torch.arange(len(sample), device=own.device) - starts[sample]  # in this rank's part of the sample
    chunk = own[sample] // 2
    position = place + torch.where(place < chunk, rank, 2 * size - 2 - rank) * chunk  # in the sample
    rows = torch.where(position < lengths[sample], cu_seqlens[sample] + position, -1)
    return rows.long(), boundaries


def context_part(batch: Batch, image_token_id: int, rank: int, size: int, multiple: int) -> tuple[Batch, Batch]:
    """A rank's part of a batch.

    Args:
        image_token_id: what stands in for image embeddings.
        rank, size, multiple: as `context_rows` takes them.
    Returns:
        What the model runs: this rank's positions, the placeholders and `image_sources` among them, all pictures, and
        the boundaries of the whole row. And the batch itself, with those trained positions that are this rank's, in
        the same order.
    """
    rows, boundaries = context_rows(batch.cu_seqlens, rank, size, multiple)
    is_padding = rows < 0
    loss_mask = _taken(batch.loss_mask, rows)
    loss_positions = loss_mask[0].nonzero().squeeze(-1)
    is_image = batch.tokens[0] == image_token_id
    order = is_image.cumsum(0) - 1  # which of the row's embeddings a placeholder stands for
    places = (is_image[rows] & ~is_padding).nonzero().squeeze(-1)
    taken = order[rows[places]]
    part = replace(
        batch,
        tokens=_taken(batch.tokens, rows),
        labels=_taken(batch.labels, rows),
        loss_mask=loss_mask,
        loss_positions=loss_positions,
        image_positions=places,
        image_sources=taken if batch.image_sources is None else batch.image_sources[taken],
        cu_seqlens=boundaries,
        max_seqlen=-(-batch.max_seqlen // multiple) * multiple,
    )
    return part, replace(batch, loss_positions=rows[loss_positions])


def _taken(values: Tensor, rows: Tensor) -> Tensor:
    """[1, s] -> [1, rows], 0 where there is padding."""
    return values[:, rows].masked_fill(rows < 0, 0)
