"""Cut the mixed projection of a packed row into queries, keys and values and turn them by rotary angles: one kernel.

Otherwise it is two kernels that turn, one that copies queries out of the projection, and one that puts gradients
together again. It is written in Triton, whose interpreter runs it on a CPU in the tests. (Transformer Engine 2.11 has a
fused kernel too. Tried on an H200 it took nearly as long as the four, and its gradients did not agree.)

Source of the rotation: Su et al., RoFormer, arXiv:2104.09864, halves of the channels paired as in GPT-NeoX.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Positions that a program takes; each of its loads is half a head's channels of all of them.
BLOCK = 32


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _turn(  # type: ignore[no-untyped-def]
    mixed,
    query,
    key,
    value,
    angles,
    length,
    GROUPS: tl.constexpr,  # noqa: N803  (Triton's way to write what is known when it compiles)
    HEADS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    IS_BACK: tl.constexpr,  # noqa: N803
):
    """One group of heads at some positions: mixed -> query, key, value; or, going back, their gradients -> mixed's."""
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1)
    channels = tl.arange(0, WIDTH)[None, :]
    is_there = (places < length) & (channels < HALF)
    cosine = tl.load(angles + places * (2 * HALF) + channels, mask=is_there, other=0.0)
    sine = tl.load(angles + places * (2 * HALF) + HALF + channels, mask=is_there, other=0.0)
    if IS_BACK:
        sine = -sine
    row = places.to(tl.int64) * GROUPS + group
    for head in tl.static_range(HEADS + 2):
        inside = mixed + row * ((HEADS + 2) * 2 * HALF) + head * 2 * HALF + channels
        if head < HEADS:
            outside = query + (row * HEADS + head) * (2 * HALF) + channels
        elif head == HEADS:
            outside = key + row * (2 * HALF) + channels
        else:
            outside = value + row * (2 * HALF) + channels
        if IS_BACK:
            source, target = outside, inside
        else:
            source, target = inside, outside
        first = tl.load(source, mask=is_there, other=0.0)
        second = tl.load(source + HALF, mask=is_there, other=0.0)
        if head <= HEADS:
            one, two = first.to(tl.float32), second.to(tl.float32)
            first = (one * cosine - two * sine).to(first.dtype)
            second = (two * cosine + one * sine).to(second.dtype)
        tl.store(target, first, mask=is_there)
        tl.store(target + HALF, second, mask=is_there)


def _launch(mixed: Tensor, parts: tuple[Tensor, Tensor, Tensor], angles: Tensor, *, is_back: bool) -> None:
    length, groups, width = mixed.shape
    half = angles.shape[2]
    grid = (triton.cdiv(length, BLOCK), groups)
    _turn[grid](
        mixed,
        *parts,
        angles,
        length,
        GROUPS=groups,
        HEADS=width // (2 * half) - 2,
        HALF=half,
        WIDTH=triton.next_power_of_2(half),
        ROWS=BLOCK,
        IS_BACK=is_back,
    )


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (length, groups, width), channels = mixed.shape, 2 * angles.shape[2]
        query = mixed.new_empty(length, width // channels * groups - 2 * groups, channels)
        key, value = (mixed.new_empty(length, groups, channels) for _ in range(2))
        _launch(mixed.contiguous(), (query, key, value), angles, is_back=False)
        ctx.save_for_backward(angles)
        ctx.shape = mixed.shape
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        query, key, value = (gradient.contiguous() for gradient in gradients)
        mixed = query.new_empty(ctx.shape)
        _launch(mixed, (query, key, value), angles, is_back=True)
        return mixed, None


def cut_and_turn(mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a row.

    Args:
        mixed: [t, groups, (heads of a group + 2) * channels], of each group its queries, its key, its value.
        angles: float32 [t, 2, channels / 2], the cosines and sines of each position; see `row_angles`.
    Returns:
        [t, heads, channels], turned; [t, groups, channels], turned; [t, groups, channels]. In mixed's dtype; computed
        in float32.
    """
    query, key, value = _Turn.apply(mixed, angles)
    return query, key, value


def row_angles(angles: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """Of each position of a row of segments: float32 [length, 2, channels / 2], cosines and sines.

    Args:
        angles: [longest, 1, 1, channels] by the position in a segment, both halves of the channels alike.
        cu_seqlens: int32 [segments + 1], to the row's end.
    """
    places = torch.arange(length, device=angles.device)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens, places, right=True) - 1]
    chosen = angles[places - starts, 0, 0, : angles.shape[3] // 2].float()  # [length, channels / 2]
    return torch.stack([chosen.cos(), chosen.sin()], dim=1)
