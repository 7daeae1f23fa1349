"""Batches that are read ahead: the same ones, and nothing is told of those that were not taken yet."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmcore import distributed, host
from mmcore.config import ParallelConfig
from mmcore.data.batch import Batch
from mmcore.data.stream import Count, TooManySkippedError
from mmcore.training import prefetch, step
from mmcore.training.batches import Batches
from mmcore.training.prefetch import Prefetch
from tests import ranks, tiny
from tests.data import fabricated

BROKEN = 4  # reading it fails


class Numbered(Iterator[Batch]):
    """Batches by number."""

    def __init__(self) -> None:
        self.next = 0

    def __next__(self) -> Batch:
        if self.next == BROKEN:
            raise TooManySkippedError("batch 4")
        self.next += 1
        return tiny.batch(self.next - 1, 1)

    def counts(self) -> dict[str, Count]:
        return {"only": Count(samples=self.next)}

    def state(self) -> bytes:
        return str(self.next).encode()


class Read(Iterator[Batch]):
    """What a loader gives, as `Batches` does without any ranks."""

    def __init__(self, loader: Any) -> None:
        self.batches, self.counts, self.state = iter(loader), loader.counts, loader.state_dict

    def __next__(self) -> Batch:
        return next(self.batches)


def test_what_is_told_is_of_what_was_taken() -> None:
    source = Numbered()
    batches = Prefetch(source)
    assert batches.state() == b"0"
    for taken, ahead in ((0, 0), (1, 2), (2, 2), (3, 0)):
        assert next(batches).keys == [f"s{taken}"]
        batches.read_ahead(ahead)
        assert batches.state() == str(taken + 1).encode()
        assert batches.counts() == {"only": Count(samples=taken + 1)}
        assert source.next == min(BROKEN, max(taken + 1 + ahead, source.next))


def test_a_batch_that_cannot_be_read_stops_the_run_in_its_turn() -> None:
    batches = Prefetch(Numbered())
    batches.read_ahead(9)
    assert [next(batches).keys for _ in range(BROKEN)] == [["s0"], ["s1"], ["s2"], ["s3"]]
    with pytest.raises(TooManySkippedError, match="batch 4"):
        next(batches)
    assert batches.state() == b"4"


def test_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """All reading on a CPU; on a GPU what is read ahead counts only where it runs out of work meanwhile."""
    clock = [0.0]
    monkeypatch.setattr(prefetch, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Slow(Numbered):
        def __next__(self) -> Batch:
            clock[0] += 1
            return super().__next__()

    batches = Prefetch(Slow())
    next(batches)
    batches.read_ahead(2)
    assert batches.waited == 3
    monkeypatch.setattr(host, "has_passed", lambda _: False)
    batches.read_ahead(3)
    assert (clock[0], batches.waited) == (4, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loaders_state_is_exact(tmp_path: Any, workers: int) -> None:
    """However much was read ahead, from the state the next batch is the one that was not taken."""
    path, tokenizer = fabricated.write_shards(tmp_path / "data", 30), fabricated.tokenizer(tmp_path / "tokenizer")

    def loader(states: Any = ()) -> Any:
        data = {"num_streams": 2, "num_workers": workers}
        return fabricated.loader(path, tokenizer, data=data, states=states)

    whole = iter(loader())
    expected = [next(whole).keys for _ in range(8)]
    for ahead in (0, 1, 3):
        opened, found = loader(), []
        batches = Prefetch(Read(opened))
        for _ in range(5):
            found.append(next(batches).keys)
            batches.read_ahead(ahead)
        assert found == expected[:5]
        again = iter(loader([batches.state()]))
        assert [next(again).keys for _ in range(3)] == expected[5:]
        opened.close()


@pytest.mark.parametrize(("number", "read"), [(3, [1, 2, 3]), (4, [1, 2, 4]), (1, [1, 1, 1]), (0, [0, 0, 0])])
def test_reading_keeps_pace_with_the_step(number: int, read: list[int]) -> None:
    """A step of three micro batches, and so many of the next one."""
    source = Numbered()
    batches, found = Prefetch(source), []
    for done in (1, 2, 3):
        batches.keep_pace(number, 3, done)
        found.append(source.next)
    assert found == read


def handed() -> list[int]:
    told: list[int] = []
    given = [tiny.batch(number, 1) for number in range(3)]
    assert [batch.keys for batch in step.handed_out(given, told.append)] == [["s0"], ["s1"], ["s2"]]
    return told


def test_the_step_tells_what_is_on_its_way() -> None:
    """But for stages of a pipeline, which are at different places of it."""
    assert ranks.run(handed, ParallelConfig(), 1) == [[0, 1, 2]]
    assert ranks.run(handed, ParallelConfig(pipeline_model_parallel_size=2), 2) == [[], []]


def read_in_replica() -> list[Any]:
    """Both tensor ranks of a replica read, of which one has the data, until it fails."""
    batches: Any = Batches.__new__(Batches)
    batches.loader, batches.image_token_id = None, tiny.LANGUAGE.vocab_size
    if distributed.is_data_source():
        source = Numbered()
        batches.loader = SimpleNamespace(counts=source.counts, state_dict=source.state)
        batches.iterator = source
    ahead = Prefetch(batches)
    found: list[Any] = []
    for number in range(BROKEN):
        batch = next(ahead)
        assert batch.image_positions is not None
        assert (batch.tokens.flatten()[batch.image_positions] == tiny.LANGUAGE.vocab_size).all()
        found.append((batch.keys, batch.tokens, len(batch.image_positions)))
        ahead.read_ahead(2 if number else 0)
    try:
        next(ahead)
    except TooManySkippedError as error:
        found.append(str(error))
    return found


def test_all_ranks_of_a_replica_stop_alike() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2)
    for *found, message in ranks.run(read_in_replica, layout, 2, timeout=40):
        assert message == "batch 4"
        for number, (keys, tokens, places) in enumerate(found):
            assert keys == [f"s{number}"] and places == 4
            assert torch.equal(tokens, tiny.batch(number, 1).tokens)
