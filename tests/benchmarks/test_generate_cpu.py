"""The benchmark of generation runs: both ways answer the same, and it would be seen if they did not."""

from dataclasses import replace

import pytest

from benchmarks import generate_cpu, train_cpu
from mmcore.config import ParallelConfig
from tests import ranks
from tests.benchmarks.test_train_cpu import LANGUAGE, VISION

ARCH = train_cpu.architecture(VISION, LANGUAGE)


def test_a_small_run() -> None:
    result = ranks.run(lambda: generate_cpu.measure(ARCH, 12, 4, 1), ParallelConfig(), 1)[0]
    requests = generate_cpu.draw(ARCH, 12)
    assert result["new_tokens"] == sum(request.max_new_tokens for request in requests)
    assert 4 <= result["batches_of_one_length"] <= 12 and result["ratio"] > 0
    assert set(result["new_tokens_per_second"]) == {"continuous", "buckets"}


def test_another_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> list[list[int]]:
        return [[0], *generate_cpu.answered(*arguments[:2])[1:]]  # type: ignore

    monkeypatch.setattr(generate_cpu, "answered_in_buckets", wrong)
    with pytest.raises(AssertionError, match=r"1 of 3 answers are not the same"):
        ranks.run(lambda: generate_cpu.measure(ARCH, 3, 2, 1), ParallelConfig(), 1)


def test_buckets_have_one_length_and_at_most_so_many() -> None:
    requests = [replace(request, max_new_tokens=1) for request in generate_cpu.draw(ARCH, 40)]
    found = generate_cpu.buckets(requests, 2)
    assert sorted(index for batch in found for index in batch) == list(range(40))
    assert all(len({len(requests[index].prompt.tokens) for index in batch}) == 1 for batch in found)
    assert max(map(len, found)) == 2
