"""The update of `LeanAdam` as one kernel, which reads and writes each number once: 18 bytes a weight.

Some thirty operators over float32 copies move more than ten times as much. It is written in Triton, whose interpreter
runs it on a CPU in the tests. All rounding is done on the bits, so that every device does the same.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _wide(bits):  # type: ignore[no-untyped-def,unused-ignore]
    """The bits of a bf16 as the float32 of the same value."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _nearest(number):  # type: ignore[no-untyped-def,unused-ignore]
    """The upper half of the nearest bf16's bits, ties to even; the number is finite."""
    bits = number.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _update(  # type: ignore[no-untyped-def]
    weight,
    gradient,
    remainder,
    exp_avg,
    exp_avg_sq,
    length,
    one_less_beta1,
    beta2,
    one_less_beta2,
    correction,
    eps,
    rate,
    kept,
    IS_WIDE: tl.constexpr,  # noqa: N803  (Triton's way to write what is known when it compiles)
    SIZE: tl.constexpr,  # noqa: N803
):
    places = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    is_there = places < length
    slope = tl.load(gradient + places, mask=is_there, other=0)
    if not IS_WIDE:
        slope = _wide(slope)
    first = _wide(tl.load(exp_avg + places, mask=is_there, other=0))
    second = _wide(tl.load(exp_avg_sq + places, mask=is_there, other=0))
    first = first + one_less_beta1 * (slope - first)
    second = second * beta2 + one_less_beta2 * (slope * slope)
    tl.store(exp_avg + places, _nearest(first).to(tl.int16), mask=is_there)
    tl.store(exp_avg_sq + places, _nearest(second).to(tl.int16), mask=is_there)
    low = tl.load(remainder + places, mask=is_there, other=0).to(tl.int32) & 0xFFFF
    high = tl.load(weight + places, mask=is_there, other=0).to(tl.int32) - (low > 0x8000).to(tl.int32)
    master = ((high << 16) + low).to(tl.float32, bitcast=True) * kept
    root = tl.sqrt_rn(tl.div_rn(second, tl.zeros_like(second) + correction)) + eps
    master = master - rate * tl.div_rn(first, root)
    bits = master.to(tl.int32, bitcast=True)
    high, low = _nearest(master), bits & 0xFFFF
    was_rounded_up = (high != (bits >> 16)).to(tl.int32)
    low = tl.where(low == 0x8000, low + 2 * was_rounded_up - 1, low)
    tl.store(weight + places, high.to(tl.int16), mask=is_there)
    tl.store(remainder + places, low.to(tl.int16), mask=is_there)


def update(part: tuple[Tensor, ...], group: dict[str, Any]) -> None:
    """AdamW in place, as `mmcore.training.lean_adam.update` does it.

    Args:
        part: flat: weight bf16, gradient bf16 or float32, remainder int16, both moments bf16; all finite.
        group: of the optimizer, its step counted.
    """
    weight, gradient, remainder, exp_avg, exp_avg_sq = part
    beta1, beta2 = group["betas"]
    _update[(triton.cdiv(len(weight), BLOCK),)](
        weight.view(torch.int16),
        gradient if gradient.dtype == torch.float32 else gradient.view(torch.int16),
        remainder,
        exp_avg.view(torch.int16),
        exp_avg_sq.view(torch.int16),
        len(weight),
        1 - beta1,
        beta2,
        1 - beta2,
        1 - beta2 ** group["step"],
        group["eps"],
        group["lr"] / (1 - beta1 ** group["step"]),
        1 - group["lr"] * group["weight_decay"],
        IS_WIDE=gradient.dtype == torch.float32,
        SIZE=BLOCK,
    )
