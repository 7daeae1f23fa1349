"""Loss curves as inline SVG: coloured by the page's CSS variables, drawn without a library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, groupby

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 44
MAX_POINTS = 1000  # of a path; a longer curve is thinned
LOG_RATIO = 10  # a curve that falls further has a logarithmic axis


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


def svg(curve: Curve) -> str:
    """One chart: the raw loss faint, its moving average strong.

    Args:
        curve: its steps rise; losses that are no number leave a gap.
    """
    finite = [loss for loss in curve.losses if math.isfinite(loss)]
    if not finite:
        return '<p class="quiet">No finite loss was logged.</p>'
    low, high = min(finite), max(finite)
    is_log = low > 0 and high / low > LOG_RATIO
    if is_log:
        low, high = low / 1.1, high * 1.1
        y_ticks = log_ticks(low, high)
    else:
        low, high = min(low, 0.0), high * 1.05 or 1.0
        y_ticks = ticks(low, high)
    first, last = curve.steps[0], max(curve.steps[-1], curve.steps[0] + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(loss: float) -> float:
        share = math.log(loss / low) / math.log(high / low) if is_log else (loss - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def path(losses: Sequence[float], kind: str) -> str:
        """Move to the first point of every run of finite ones, then draw lines."""
        every = math.ceil(len(losses) / MAX_POINTS)
        points = [*zip(curve.steps, losses, strict=True)][::every]
        runs = [list(run) for drawn, run in groupby(points, lambda point: math.isfinite(point[1])) if drawn]
        lines = "".join("M" + "L".join(f"{x(step):.1f} {y(loss):.1f}" for step, loss in run) for run in runs)
        return f'<path class="{kind}" d="{lines}"/>'

    grid = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:.4g}</text>'
        for mark in y_ticks
    ]
    axis = HEIGHT - BOTTOM
    marks = [
        f'<text x="{x(mark):.1f}" y="{axis + 18}" text-anchor="middle">{mark:.0f}</text>'
        for mark in ticks(first, last, 6)
        if mark == int(mark)
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"Loss of {curve.name} by step")}">'
        f"{''.join(grid)}"
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis}" y2="{axis}"/>{"".join(marks)}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>'
        f'<text x="14" y="{(TOP + axis) / 2}" text-anchor="middle" transform="rotate(-90 14 {(TOP + axis) / 2})">'
        f"loss{' (log scale)' if is_log else ''}</text>"
        f"{path(curve.losses, 'raw')}{path(smooth(curve.losses, smoothing_window(curve)), 'mean')}</svg>"
    )
