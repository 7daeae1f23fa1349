"""Histograms: inline SVG in the colours of a report's page, and bars of characters for a terminal."""

from collections.abc import Sequence
from html import escape

from mmcore.evaluation.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, short, ticks

# First and last value, and how many.
Bin = Sequence[int]

FEW_BINS = 12  # so many have room for their numbers

FULL = "\u2588"


def svg(bins: Sequence[Bin], *, title: str, x_label: str, y_label: str, limit: int | None = None) -> str:
    """A bar for each bin.

    Args:
        bins: of one width, without gaps.
        limit: a value to mark, if it lies among the bins.
    """
    if not bins:
        return '<p class="quiet">There is nothing to count.</p>'
    first, last, highest = bins[0][0], bins[-1][1] + 1, max(count for *_, count in bins) or 1
    single = bins[0][0] == bins[0][1]
    axis = HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - first) / (last - first)

    def y(count: float) -> float:
        return axis - (axis - TOP - 14) * count / highest

    grid = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{short(mark)}</text>'
        for mark in ticks(0, highest)
        if mark == int(mark)
    ]
    bars = [
        f'<rect x="{x(low) + 1:.1f}" y="{min(y(count), axis - 1):.1f}" width="{max(1, x(high + 1) - x(low) - 2):.1f}" '
        f'height="{max(1, axis - y(count)):.1f}"><title>{span(low, high)} {escape(x_label)}: {count:,}</title></rect>'
        for low, high, count in bins
        if count
    ]
    numbers = [
        f'<text x="{x((low + high + 1) / 2):.1f}" y="{y(count) - 5:.1f}" text-anchor="middle">{short(count)}</text>'
        for low, high, count in bins
        if count and len(bins) <= FEW_BINS
    ]
    middle = 0.5 if single else 0.0
    marks = [
        f'<text x="{x(mark + middle):.1f}" y="{axis + 18}" text-anchor="middle">{short(mark)}</text>'
        for mark in ticks(first, last - single, 6)
        if mark == int(mark)
    ]
    limits = []
    if limit is not None and first <= limit <= last:
        anchor, away = ("end", -6) if x(limit) > WIDTH / 2 else ("start", 6)
        limits = [
            f'<line class="limit" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="{TOP}" y2="{axis}"/>'
            f'<text x="{x(limit) + away:.1f}" y="{TOP + 8}" text-anchor="{anchor}">window {short(limit)}</text>'
        ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(grid)}{''.join(bars)}{''.join(numbers)}{''.join(limits)}"
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis}" y2="{axis}"/>{"".join(marks)}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="14" y="{(TOP + axis) / 2}" text-anchor="middle" transform="rotate(-90 14 {(TOP + axis) / 2})">'
        f"{escape(y_label)}</text></svg>"
    )


def lines(bins: Sequence[Bin], width: int, *, ascii_only: bool) -> list[str]:
    """A line for each bin, `width` characters at most where that leaves room for a bar.

    Args:
        ascii_only: bars of `#`, for terminals that cannot show blocks.
    """
    names = [span(low, high) for low, high, _ in bins]
    counts = [f"{count:,}" for *_, count in bins]
    name_width, count_width = max(map(len, names), default=0), max(map(len, counts), default=0)
    highest, room = max((count for *_, count in bins), default=0) or 1, max(1, width - name_width - count_width - 2)
    return [
        f"{name:>{name_width}} {bar(found[2] / highest, room, ascii_only=ascii_only):<{room}} {count:>{count_width}}"
        for name, count, found in zip(names, counts, bins, strict=True)
    ]


def bar(share: float, width: int, *, ascii_only: bool) -> str:
    """So much of `width` characters; something above 0 is never nothing."""
    if ascii_only:
        return "#" * max(round(share * width), share > 0)
    full, eighths = divmod(max(round(share * width * 8), share > 0), 8)
    return FULL * full + (chr(ord(FULL) + 8 - eighths) if eighths else "")


def span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"
