"""Losses chunk by chunk against all at once: equal losses and gradients, and no buffer larger than a chunk's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mmcore.config import ParallelConfig
from mmcore.models import chunks
from mmcore.training.step import forward_step
from tests import ranks, tiny

ROWS = 3  # of a chunk: the last one is shorter
LAYOUTS = {
    "one": (ParallelConfig(), 1),
    "tp2": (ParallelConfig(tensor_model_parallel_size=2), 2),
    "tp2sp": (ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), 2),
    "cp2": (ParallelConfig(context_parallel_size=2), 2),
}


class Widest(TorchDispatchMode):
    """Most rows of any result with so many columns, weights left out, which have as many rows as the model is wide."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if not isinstance(result, torch.Tensor) or not result.ndim or result.shape[-1] != self.columns:
                continue
            if result.shape[0] != tiny.LANGUAGE.hidden_size:
                self.rows = max(self.rows, result.numel() // self.columns)
        return results


def step(layout: ParallelConfig, is_tied: bool, frozen: str, chunk_bytes: int) -> tuple[torch.Tensor, Any, int, int]:
    """Losses, gradients, trained positions, and the most rows of logits that were there at once."""
    chunks.CHUNK_BYTES = chunk_bytes
    language = replace(tiny.LANGUAGE, share_embeddings_and_output_weights=is_tied)
    model = tiny.build(layout, arch=replace(tiny.architecture(), language=language))
    for name, parameter in model.named_parameters():
        if frozen and name.startswith(frozen):
            parameter.requires_grad_(False)
    with Widest(language.padded_vocab_size // layout.tensor_model_parallel_size) as widest:
        losses, to_loss = forward_step(iter([tiny.batch(0, 4)]), model)
        to_loss(losses)[0].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return losses.detach(), gradients, len(losses), widest.rows


def both(layout: ParallelConfig) -> None:
    """Chunked and not, tied and untied, of an output layer that is trained and one that is not."""
    row = tiny.LANGUAGE.padded_vocab_size // layout.tensor_model_parallel_size * 4
    for is_tied in (False, True):
        for frozen in ("", "language_model"):
            losses, gradients, count, rows = step(layout, is_tied, frozen, 2**28)
            assert rows == count > 2 * ROWS
            chunked, found, _, rows = step(layout, is_tied, frozen, ROWS * row + 1)
            assert rows == ROWS
            torch.testing.assert_close(chunked, losses, rtol=1e-6, atol=1e-6)
            assert found.keys() == gradients.keys()
            assert any(name.startswith("language_model") for name in found) == (not frozen)
            for name, gradient in gradients.items():
                rounding = 1e-5 * gradient.abs().max().item()
                torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=rounding, msg=name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_change_nothing(name: str) -> None:
    layout, world_size = LAYOUTS[name]
    ranks.run(both, layout, world_size, layout)


def test_rows_of_a_chunk() -> None:
    assert chunks.chunk_rows(32768) == 2048  # Mistral's
    assert chunks.chunk_rows(2**30) == 1
