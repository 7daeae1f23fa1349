"""A map is strict both ways, and says everything that is wrong at once."""

from pathlib import Path

import pytest
import torch
from layout import stack_rows
from weight_files import Header, Weights
from weight_map import Drop, Move, apply

ROWS = (
    Move("whole", {"a": (2,)}),
    Move("layers.fused", {"l.{}.x": (2, 3), "l.{}.y": (1, 3)}, stack_rows),
    Drop("text.*", "not wanted"),
)


def weights(**changes: torch.Tensor | None) -> Weights:
    state = {"a": torch.ones(2), "text.b": torch.ones(1, dtype=torch.int64)}
    state |= {f"l.{i}.{part}": torch.full((rows, 3), i + 1.0) for i in range(2) for part, rows in (("x", 2), ("y", 1))}
    state = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    headers = {name: Header(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    return Weights(name="the source", files=(Path("f"),), headers=headers, read=state.__getitem__)


def test_layers_are_chunks_of_one_tensor() -> None:
    stored, dropped = apply(ROWS, 2, weights())
    assert stored["whole"].global_shape == (2,) and stored["layers.fused"].global_shape == (2, 3, 3)
    assert [stored["layers.fused"].read(layer).unique().tolist() for layer in range(2)] == [[1], [2]]
    assert dropped == {"not wanted": 1}


def test_a_single_layer_is_stacked_too() -> None:
    stored, _ = apply(ROWS, 1, weights(**{"l.1.x": None, "l.1.y": None}))
    assert stored["layers.fused"].global_shape == (1, 3, 3)


def test_all_differences_are_told_at_once() -> None:
    source = weights(
        **{"a": None, "l.0.x": torch.ones(3, 2), "l.1.y": torch.ones(1, 3, dtype=torch.int8), "l.2.x": torch.ones(2, 3)}
    )
    with pytest.raises(ValueError, match=r"the source .*4 differences") as raised:
        apply(ROWS, 2, source)
    for told in (
        "missing: a [2]",
        "wrong shape: l.0.x is [3, 2], the architecture has [2, 3]",
        "wrong dtype: l.1.y is torch.int8",
        "unknown: l.2.x [2, 3]",
    ):
        assert told in str(raised.value)


def test_mixed_dtypes_become_the_narrowest_that_rounds_nothing() -> None:
    source = weights(
        **{"l.0.x": torch.ones(2, 3, dtype=torch.float16), "l.1.y": torch.ones(1, 3, dtype=torch.bfloat16)}
    )
    stored, _ = apply(ROWS, 2, source)
    assert stored["layers.fused"].dtype == torch.float32
    halves = {name: torch.ones(shape, dtype=torch.float16) for name, shape in (("l.0.x", (2, 3)), ("l.0.y", (1, 3)))}
    stored, _ = apply(ROWS, 1, weights(**halves, **{"l.1.x": None, "l.1.y": None}))
    assert stored["layers.fused"].dtype == stored["layers.fused"].read(0).dtype == torch.float16
