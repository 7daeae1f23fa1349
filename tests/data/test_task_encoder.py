"""What a trained token counts, in answers of every length."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from mmcore.data.shards import ShardWriter
from mmcore.data.task_encoder import loss_weights
from tests.data import fabricated
from tests.data.fabricated import conversation, loader

MASK = [0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1]


def test_weights_of_answers() -> None:
    is_trained = np.array(MASK, np.bool_)
    assert loss_weights(is_trained, "tokens").tolist() == MASK
    weights = loss_weights(is_trained, "sqrt_turn")
    assert weights.dtype == np.float32
    half = math.sqrt(1 / 2)
    assert weights.tolist() == pytest.approx([0, 0.5, 0.5, 0.5, 0.5, 0, 0, 1, 0, half, half], rel=1e-7)
    for mask in itertools.product([False, True], repeat=7):  # an answer of n tokens weighs sqrt(n) in all
        lengths = [len(list(group)) for trained, group in itertools.groupby(mask) if trained]
        found = loss_weights(np.array(mask), "sqrt_turn")
        assert found.sum() == pytest.approx(sum(map(math.sqrt, lengths)), rel=1e-6)
        assert ((found > 0) == mask).all()


def test_weights_of_a_batch(tmp_path: Path) -> None:
    """Each answer of a conversation counts by its own length, its end token included; labels stay the same."""
    tokenizer = fabricated.tokenizer(tmp_path / "tokenizer")
    with ShardWriter(tmp_path / "out") as writer:
        talk = conversation("what", "one", "is it", "it is number one two three")
        writer.write("train", "0", {"json": json.dumps({"id": "a", "conversations": talk}).encode()})
    plain, weighted = (
        next(iter(loader(tmp_path / "out", tokenizer, micro_batch_size=2, loss_weighting=weighting)))
        for weighting in ("tokens", "sqrt_turn")
    )
    lengths = [len(tokenizer.encode(talk[index]["value"])) + 1 for index in (1, 3)]
    assert lengths[0] < lengths[1]
    expected = [1 / math.sqrt(length) for length in lengths for _ in range(length)]
    assert weighted.loss_mask[0, weighted.loss_positions].tolist() == pytest.approx(2 * expected, rel=1e-6)
    assert plain.loss_mask[0, plain.loss_positions].unique().tolist() == [1]
    assert plain.labels.equal(weighted.labels) and plain.loss_positions.equal(weighted.loss_positions)
