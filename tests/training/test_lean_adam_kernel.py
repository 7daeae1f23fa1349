"""The kernel of lean AdamW against the operators, run on a CPU by Triton's interpreter, in a process of its own."""

import pytest
import torch

from mmcore.training.loss import scale_by
from tests.models.test_turn import run

SCRIPT = """
import sys, torch
from mmcore.training import lean_adam, lean_adam_kernel

torch.manual_seed(0)
length = 3001
master = torch.randn(length) * 0.02
weight, remainder = lean_adam.split(master)
state = [weight, None, remainder, torch.zeros(length).bfloat16(), torch.zeros(length).bfloat16()]
copies = [None if one is None else one.clone() for one in state]
group = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 0}
for _ in range(4):
    group["step"] += 1
    gradient = torch.randn(length) * 10.0 ** torch.randint(-6, 2, (length,))
    gradient[::7] = 0
    gradient = gradient.to(getattr(torch, sys.argv[1]))
    state[1] = copies[1] = gradient
    lean_adam.update(tuple(state), group)
    lean_adam_kernel.update(tuple(copies), group)
    found, expected = lean_adam.join(copies[0], copies[2]), lean_adam.join(state[0], state[2])
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-9)
    assert torch.equal(copies[0], found.bfloat16()), "the weight is the nearest to its master"
    for one, other in zip(copies[3:], state[3:]):
        assert (one != other).float().mean() < 1e-3, "but for ties of two roundings"
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-7, atol=0)
        other.copy_(one)
    state[0].copy_(copies[0]), state[2].copy_(copies[2])
assert not torch.equal(found, master)
print("equal")
"""


@pytest.mark.parametrize("gradient", ["bfloat16", "float32"])
def test_the_kernel_is_the_update(gradient: str) -> None:
    run(SCRIPT, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_is_not_rounded_to_the_gradients_precision(dtype: torch.dtype) -> None:
    gradients, factor = torch.randn(1001).to(dtype), torch.tensor(1.00390625 - 2**-10)
    scaled = (gradients.float() * factor).to(dtype)
    assert dtype == torch.float32 or not torch.equal(scaled, gradients * factor.to(dtype))
    scale_by(gradients, factor)
    assert torch.equal(gradients, scaled)
