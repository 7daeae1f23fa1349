"""The kernel that cuts and turns, run by Triton's interpreter, against mcore's rotary embedding of each segment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import torch
from mmcore.models.turn import cut_and_turn, row_angles

lengths, groups, heads, channels, dtype = eval(sys.argv[1])
torch.manual_seed(0)
total = sum(lengths)
mixed = torch.randn(total, groups, (heads + 2) * channels, dtype=dtype).requires_grad_()
frequencies = 1.0 / (10000 ** (torch.arange(0, channels, 2) / channels))
angles = torch.outer(torch.arange(max(lengths)), frequencies)
angles = torch.cat([angles, angles], -1)[:, None, None]  # [longest, 1, 1, channels], as mcore's
ends = torch.tensor([0, *lengths]).cumsum(0).int()
found = cut_and_turn(mixed, row_angles(angles, ends, total))
weights = [torch.randn_like(part) for part in found]
sum((part * weight).sum() for part, weight in zip(found, weights)).backward()
gradient, mixed.grad = mixed.grad, None

# mcore's own code for what is not fused, segment by segment.
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
split = mixed.view(total, groups, heads + 2, channels)
query, key, value = split[:, :, :heads].flatten(1, 2), split[:, :, heads], split[:, :, heads + 1]

def turned(part):
    pieces = part.float().split(list(lengths))
    return torch.cat([_apply_rotary_pos_emb_bshd(piece[:, None], angles[: len(piece)])[:, 0] for piece in pieces])

expected = [turned(query), turned(key), value]
sum((part * weight).sum() for part, weight in zip(expected, weights)).backward()
tolerance = 1e-5 if dtype == torch.float32 else 1e-2
for mine, theirs in zip((*found, gradient), (*expected, mixed.grad)):
    assert mine.dtype == dtype and mine.shape == theirs.shape, (mine.dtype, mine.shape, theirs.shape)
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=tolerance, atol=tolerance)
print("equal")
"""


@pytest.mark.parametrize(
    "case",
    [
        "((5, 1, 40), 2, 3, 16, torch.float32)",  # rows of no whole block, grouped queries
        "((33,), 1, 1, 12, torch.float32)",  # half of the channels is no power of two
        "((20, 20), 2, 4, 32, torch.bfloat16)",
    ],
)
def test_the_kernel(case: str) -> None:
    run(SCRIPT, case)


def run(script: str, *arguments: str) -> None:
    """In a process of its own: the interpreter is chosen before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-c", "from mmcore import host; host.use_host()\n" + script, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.strip() == "equal", done.stdout + done.stderr


MODEL = """
import torch
from mmcore.config import ParallelConfig
from mmcore import distributed
from mmcore.models.row_attention import RowAttention
from mmcore.training.step import forward_step
from tests import tiny

distributed.initialize(ParallelConfig(), seed=1)
found = []
for backend in ("local", "transformer_engine"):
    model = tiny.build(ParallelConfig())
    if backend != "local":  # Transformer Engine's layers stay away: what is new is the same over local ones
        model.language_model.backend = backend
        for layer in model.language_model.decoder.layers:
            layer.self_attention.__class__ = RowAttention
    losses, to_loss = forward_step(iter([tiny.batch(0, 5)]), model)
    to_loss(losses)[0].backward()
    found.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
(losses, gradients), (fused, fused_gradients) = found
torch.testing.assert_close(fused, losses, rtol=1e-5, atol=1e-6)
assert gradients.keys() == fused_gradients.keys() and len(gradients) > 40
for name, gradient in gradients.items():
    scale = gradient.abs().max()
    assert (fused_gradients[name] - gradient).abs().max() <= 1e-5 * scale, name
print("equal")
"""


def test_a_model_with_it() -> None:
    run(MODEL)


def test_angles_begin_anew_in_each_segment() -> None:
    from mmcore.models.turn import row_angles

    angles = torch.arange(4.0)[:, None, None, None].expand(4, 1, 1, 6)
    found = row_angles(angles, torch.tensor([0, 3, 4, 8], dtype=torch.int32), 8)
    places = torch.tensor([0.0, 1, 2, 0, 0, 1, 2, 3])
    torch.testing.assert_close(found, torch.stack([places.cos(), places.sin()], 1)[:, :, None].expand(8, 2, 3))
