"""Which graph computes how many pictures, and when it is made anew; on a CPU a graph is the function itself."""

from typing import Any

import pytest
import torch

from mmcore import host
from mmcore.models.graphs import MOST, Graphs, graph_size


@pytest.mark.parametrize(
    ("number", "size"), [(0, 0), (1, 4), (4, 4), (5, 8), (MOST - 1, MOST), (MOST, MOST), (MOST + 1, 0)]
)
def test_graph_size(number: int, size: int) -> None:
    assert graph_size(number) == size


def test_a_graph_for_each_size_and_for_weights_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    captured = host.Captured

    def capture(function: Any, example: torch.Tensor) -> host.Captured:
        made.append(len(example))
        return captured(function, example)

    monkeypatch.setattr(host, "Captured", capture)
    weight = torch.tensor([3.0])
    graphs = Graphs(lambda images: images.float() * weight)
    for number in (3, 4, 1, 5, 2):
        images = torch.randint(0, 255, (number, 2, 2), dtype=torch.uint8)
        assert torch.equal(graphs(images, [weight]), images.float() * weight)
    assert made == [4, 8]
    weight.mul_(2)  # in place: the graph reads the same memory
    first = graphs(images, [weight])
    assert torch.equal(first, images.float() * 6) and made == [4, 8]
    weight = torch.tensor([5.0])
    assert torch.equal(graphs(images, [weight]), images.float() * 5) and made == [4, 8, 4]
    assert torch.equal(first, images.float() * 6), "what was given out is not overwritten by the next pass"


def test_what_is_begun_ahead_is_taken_in_its_order() -> None:
    calls: list[int] = []

    def function(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images.float() * weight

    weight = torch.tensor([3.0])
    graphs = Graphs(function)
    first, second, other = (torch.randint(0, 255, (number, 2, 2), dtype=torch.uint8) for number in (3, 4, 2))
    for _ in range(2):  # begun twice, done once
        graphs.begin(first, [weight])
        graphs.begin(second, [weight])
    done = len(calls)
    for images in (first, second):
        found = graphs.take(images)
        assert found is not None and torch.equal(found, images * weight)
    assert graphs.take(first) is None and len(calls) == done
    graphs.begin(first, [weight])
    assert graphs.take(other) is None and graphs.take(first) is None, "of a pass that was broken off"
