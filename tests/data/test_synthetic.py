"""Samples made up: repeatable at every number of replicas, of the shapes that they are said to have."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mmcore.config import DataConfig
from mmcore.data.batch import Batch
from mmcore.data.pictures import Pictures
from mmcore.data.synthetic import SyntheticLoader
from mmcore.models.architecture import PictureArch

CONFIG = DataConfig(seq_length=1024, packing_buffer_size=256)
SQUARES = {"image_token_id": 999, "image_size": 28, "num_square_embeddings": 4, "background": (0, 0, 0)}


def loader(config: DataConfig = CONFIG, rank: int = 0, size: int = 1, **changed: object) -> SyntheticLoader:
    options = {"vocab_size": 900, "conversation": "plain", "pictures": Pictures(**SQUARES), "micro_batch_size": 1}
    return SyntheticLoader(
        config, tokenizer=None, data_parallel_rank=rank, data_parallel_size=size, seed=3, **{**options, **changed}
    )


def batches(number: int, **options: object) -> Iterator[Batch]:
    return islice(loader(**options), number)


def test_the_same_on_any_number_of_replicas() -> None:
    whole = list(batches(4))
    dealt = [list(batches(2, rank=rank, size=2)) for rank in range(2)]
    for number, batch in enumerate(whole):
        other = dealt[number % 2][number // 2]
        assert torch.equal(batch.tokens, other.tokens) and torch.equal(batch.images, other.images)
        assert batch.keys == other.keys


def test_it_goes_on_where_it_was_saved() -> None:
    first = loader()
    list(islice(first, 3))
    second = loader(states=[first.state_dict()])
    assert torch.equal(next(iter(first)).tokens, next(iter(second)).tokens)
    assert second.counts()["synthetic"].samples == first.counts()["synthetic"].samples


def test_rows_are_filled() -> None:
    found = list(batches(20, micro_batch_size=2))
    assert all(batch.tokens.shape[1] <= 2 * 1024 for batch in found)
    assert sum(batch.tokens.shape[1] for batch in found) > 0.97 * 20 * 2 * 1024


def test_without_packing_a_row_is_a_sample() -> None:
    config = replace(CONFIG, packing_buffer_size=0)
    assert all(len(batch.keys) == 3 for batch in batches(5, config=config, micro_batch_size=3))


@pytest.mark.parametrize(("conversation", "mean", "share"), [("plain", 64, 1.0), ("vicuna_v1", 512, 2 / 3)])
def test_lengths_and_labels(conversation: str, mean: int, share: float) -> None:
    config = replace(CONFIG, packing_buffer_size=0, seq_length=8192)
    found = list(batches(2000, config=config, conversation=conversation))
    texts = [batch.tokens.shape[1] - 4 for batch in found]
    assert sum(texts) / len(texts) == pytest.approx(mean, rel=0.05)
    assert sum(len(batch.loss_positions) for batch in found) / sum(texts) == pytest.approx(share, rel=0.01)
    for batch in found[:20]:
        assert int((batch.tokens == 999).sum()) == 4 and len(batch.images) == 1
        assert torch.equal(batch.labels[0, batch.loss_positions[:-1]], batch.tokens[0, batch.loss_positions[1:]])


def test_tiles_go_through_the_real_layout() -> None:
    arch = PictureArch(mode="squash", tiling="anyres", grid_pinpoints=((28, 56), (56, 28)))
    options = {"tiling": arch.tiling, "mode": arch.mode, "grid_pinpoints": arch.grid_pinpoints}
    batch = next(batches(1, pictures=Pictures(**SQUARES, **options)))
    assert batch.image_sources is not None and len(batch.image_sources) == int((batch.tokens == 999).sum())
    assert len(batch.images) == 3 * len(batch.keys)


def test_a_row_too_short() -> None:
    with pytest.raises(ValueError, match=r"seq-length 5 has no room for a picture \(4 tokens\)"):
        loader(replace(CONFIG, seq_length=5))
