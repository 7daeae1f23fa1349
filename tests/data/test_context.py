"""Rows cut for context parallelism, against the definition: two chunks of every sample for each rank."""

from dataclasses import replace

import pytest
import torch

from mmcore.data.batch import Batch, collate
from mmcore.data.context import context_part, context_rows
from tests import tiny
from tests.models.test_pictures import SIZES, anyres_sample

LENGTHS = (13, 1, 24, 7)
CU_SEQLENS = torch.tensor([0, 13, 14, 38, 45], dtype=torch.int32)


def zigzag(rank: int, size: int, multiple: int) -> list[int]:
    rows, start = [], 0
    for length in LENGTHS:
        padding = -length % multiple
        positions = [*range(start, start + length), *[-1] * padding]
        chunk = len(positions) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            rows += positions[number * chunk : (number + 1) * chunk]
        start += length
    return rows


@pytest.mark.parametrize(("size", "tensor"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
def test_rows(size: int, tensor: int) -> None:
    multiple = 2 * size * tensor
    found = []
    for rank in range(size):
        rows, boundaries = context_rows(CU_SEQLENS, rank, size, multiple)
        assert rows.tolist() == zigzag(rank, size, multiple)
        assert len(rows) % (2 * tensor) == 0 and boundaries.dtype == torch.int32
        assert boundaries.diff().tolist() == [-(-length // multiple) * multiple for length in LENGTHS]
        found += rows[rows >= 0].tolist()
    assert sorted(found) == list(range(45))


@pytest.mark.parametrize("kind", ["pictures", "anyres", "text"])
def test_parts(kind: str) -> None:
    """Together the parts are the batch; each has the sources of its own placeholders."""
    image, width = tiny.LANGUAGE.vocab_size, 4  # features of a square
    if kind == "anyres":
        batch = collate([anyres_sample(seed, size) for seed, size in enumerate(SIZES)])
    else:
        batch = replace(tiny.batch(0, 3, images=2 * (kind == "pictures")), max_seqlen=19)
    order = torch.arange(len(batch.images) * width) if batch.image_sources is None else batch.image_sources
    wanted = dict(zip((batch.tokens[0] == image).nonzero().flatten().tolist(), order.tolist(), strict=True))
    positions, sources, trained = [], {}, []
    for rank in range(2):
        rows, boundaries = context_rows(batch.cu_seqlens, rank, 2, 4)
        part, own = context_part(batch, image, rank, 2, 4)
        kept = rows >= 0
        for name in ("tokens", "labels", "loss_mask"):
            values = getattr(part, name)[0]
            assert torch.equal(values[kept], getattr(batch, name)[0, rows[kept]]) and not values[~kept].any()
        assert torch.equal(part.cu_seqlens, boundaries) and part.max_seqlen == -(-batch.max_seqlen // 4) * 4
        assert torch.equal(part.images, batch.images)
        assert torch.equal(rows[part.loss_positions], own.loss_positions) and unchanged(own, batch)
        positions += rows[kept].tolist()
        trained += own.loss_positions.tolist()
        assert part.image_sources is not None
        places = rows[part.tokens[0] == image].tolist()
        sources |= dict(zip(places, part.image_sources.tolist(), strict=True))
    assert sorted(positions) == list(range(batch.tokens.shape[1]))
    assert sorted(trained) == batch.loss_positions.tolist()
    assert sources == wanted


def unchanged(batch: Batch, whole: Batch) -> bool:
    return batch.tokens is whole.tokens and batch.cu_seqlens is whole.cu_seqlens and batch.sources is whole.sources
