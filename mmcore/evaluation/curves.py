"""Curves of a run as inline SVG: coloured by the page's CSS variables, drawn without a library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, groupby

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 22, 14, 44
MAX_POINTS = 1000  # of a path; a longer curve is thinned
LOG_RATIO = 10  # a curve that falls further has a logarithmic axis


@dataclass(frozen=True, slots=True)
class Line:
    """Values by step, and how they are drawn; values that are no number leave a gap."""

    steps: Sequence[int]
    values: Sequence[float]
    kind: str = "mean"
    """CSS classes of its path: raw is faint, mean is strong; c1 to c7 are other colours than the first."""
    name: str = ""
    """In the legend; not told there if empty."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Loss by step."""

    name: str
    steps: Sequence[int]
    losses: Sequence[float]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite values among the `window` around every step; not a number where there is none."""
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    totals = [0.0, *accumulate(finite)]
    counts = [0, *accumulate(int(math.isfinite(value)) for value in values)]
    means = []
    for index in range(len(values)):
        start, end = max(0, index - window // 2), min(len(values), index + (window + 1) // 2)
        count = counts[end] - counts[start]
        means.append((totals[end] - totals[start]) / count if count else math.nan)
    return means


def smoothing_window(curve: Curve) -> int:
    """Steps of the moving average: a fiftieth of the run."""
    return max(1, len(curve.losses) // 50)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count` of them: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(rough))
    step = min((factor * magnitude for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between low and high; the powers alone over more than three decades."""
    factors = (1,) if high / low > 1000 else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [mark for mark in marks if low <= mark * (1 + 1e-9) and mark <= high * (1 + 1e-9)]


def short(number: float) -> str:
    """A number of at most five characters: 12k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{number:.0f}"


def svg(curve: Curve) -> str:
    """One chart: the raw loss faint, its moving average strong.

    Args:
        curve: its steps rise; losses that are no number leave a gap.
    """
    mean = smooth(curve.losses, smoothing_window(curve))
    lines = [Line(curve.steps, curve.losses, "raw"), Line(curve.steps, mean, "mean")]
    return chart(f"Loss of {curve.name} by step", lines, unit="loss")


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    stages: Sequence[tuple[int, str]] = (),
    span: tuple[int, int] | None = None,
    is_linear: bool = False,
    bad_steps: Sequence[int] = (),
    style: str = "",
) -> str:
    """Lines over the same steps; the axis is logarithmic where the values differ much and none is 0.

    Args:
        title: for who cannot see the picture.
        lines: the steps of each rise.
        unit: what the values are.
        stages: first step and name of each but the first: a dashed line each.
        span: first and last step of the axis; by default of the lines.
        is_linear: whether the axis is not to be logarithmic, whatever the values.
        bad_steps: a mark on the axis each.
        style: rules of a picture that stands alone; the legend is in it then.
    """
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    if not finite:
        return f'<p class="quiet">No finite {escape(unit)} was logged.</p>'
    low, high = min(finite), max(finite)
    is_log = low > 0 and high / low > LOG_RATIO and not is_linear
    if is_log:
        low, high = low / 1.1, high * 1.1
        y_ticks = log_ticks(low, high)
    else:
        low, high = min(low, 0.0), high * 1.05 or 1.0
        y_ticks = ticks(low, high)
    ends = span or [line.steps[end] for line in lines if line.steps for end in (0, -1)]
    first, last = min(ends), max(*ends, min(ends) + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def path(line: Line) -> str:
        """Move to the first point of every run of finite ones, then draw lines; one that stands alone is a dot."""
        every = math.ceil(len(line.values) / MAX_POINTS) or 1
        points = [*zip(line.steps, line.values, strict=True)][::every]
        runs = [list(run) for drawn, run in groupby(points, lambda point: math.isfinite(point[1])) if drawn]
        parts = {
            line.kind: [run for run in runs if len(run) > 1],
            f"{line.kind} dot": [run * 2 for run in runs if len(run) == 1],
        }
        return "".join(
            f'<path class="{kind}" d="'
            + "".join("M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in run) for run in part)
            + '"/>'
            for kind, part in parts.items()
            if part
        )

    grid = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{_label(mark)}</text>'
        for mark in y_ticks
    ]
    axis = HEIGHT - BOTTOM
    marks = [
        f'<text x="{x(mark):.1f}" y="{axis + 18}" text-anchor="middle">{mark:.0f}</text>'
        for mark in ticks(first, last, 6)
        if mark == int(mark)
    ]
    notes = [
        f'<line class="stage" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{axis}"/>'
        f'<text class="name" x="{x(step) + 4:.1f}" y="{axis - 8}">{escape(name)}</text>'
        for step, name in stages
        if first <= step <= last
    ]
    notes += [f'<path class="bad" d="M{x(step):.1f} {axis}V{axis - 9}"/>' for step in bad_steps[:MAX_POINTS]]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{f"<style>{style}</style>" if style else ""}{"".join(grid)}'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis}" y2="{axis}"/>{"".join(marks)}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>'
        f'<text x="14" y="{(TOP + axis) / 2}" text-anchor="middle" transform="rotate(-90 14 {(TOP + axis) / 2})">'
        f"{escape(unit)}{' (log scale)' if is_log else ''}</text>"
        f"{''.join(map(path, lines))}{''.join(notes)}{_legend(lines) if style else ''}</svg>"
    )


def _label(value: float) -> str:
    """A number on the axis: 12k, 0.05, 1.5e-5."""
    if 0 < value < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return short(value) if value >= 1e4 else f"{value:.4g}"


def _legend(lines: Sequence[Line]) -> str:
    """Names in the upper right corner, where a loss that falls leaves room."""
    named = [line for line in lines if line.name]
    return "".join(
        f'<path class="{line.kind}" d="M{WIDTH - RIGHT - 24} {TOP + 10 + 20 * row}h24"/>'
        f'<text x="{WIDTH - RIGHT - 32}" y="{TOP + 14 + 20 * row}" text-anchor="end">{escape(line.name)}</text>'
        for row, line in enumerate(named)
    )
