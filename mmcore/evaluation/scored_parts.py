"""Numbers, bars and tables of a scored run's page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from mmcore.evaluation.page import facts_table
from mmcore.evaluation.scored_run import ScoredRun
from mmcore.evaluation.scores import best, shown

NONE = "\u2013"


def colour(row: int) -> str:
    """CSS class of a run's colour."""
    return f"c{row % 7 + 1}"


def scale_of(run: ScoredRun, metric: str) -> str:
    return str(run.content["scales"].get(metric, ""))


def size_of(run: ScoredRun) -> str:
    """How many samples, and how many of them are right."""
    size = run.content["num_samples"]
    return f"{run.content['num_correct']:,} of {size:,} right" if "num_correct" in run.content else f"{size:,} samples"


def value_of(run: ScoredRun, metric: str) -> str:
    """As people write it; of a run that has no such metric a dash."""
    metrics = run.content["metrics"]
    return shown(metrics[metric], scale_of(run, metric)) if metric in metrics else NONE


def ends_of(run: ScoredRun, metric: str) -> Sequence[float]:
    """Of its interval; none where there is none."""
    return run.content.get("intervals", {}).get(metric, ())


def between(run: ScoredRun, metric: str) -> str:
    return " to ".join(shown(end, scale_of(run, metric)) for end in ends_of(run, metric))


def number(run: ScoredRun, metric: str) -> str:
    """Two cells: the metric, and its interval."""
    return f'<td class="value">{value_of(run, metric)}</td><td class="note interval">{between(run, metric)}</td>'


def axis(runs: Sequence[ScoredRun], metric: str) -> tuple[float, str]:
    """Where the bars of a metric end; and its scale in words."""
    scale = scale_of(runs[0], metric)
    end = axis_end(
        scale, [value for run in runs for value in (run.content["metrics"].get(metric, 0.0), *ends_of(run, metric))]
    )
    return end, scale if end == best(scale) else f"{scale}, bars end at {end:g}"


def axis_end(scale: str, values: Iterable[float]) -> float:
    """Where bars are full: at the best there can be, or below that at a round number if all values are far from it."""
    highest = max((value for value in values if math.isfinite(value)), default=0.0)
    if best(scale) <= 1 or scale.startswith("percent") or highest > best(scale) / 2:
        return best(scale)
    if highest <= 0:
        return 1.0
    magnitude = 10 ** math.floor(math.log10(highest))
    return next(step * magnitude for step in (1, 1.5, 2, 3, 5, 7.5, 10) if step * magnitude >= highest)


def bar(run: ScoredRun, metric: str, end: float, kind: str = "") -> str:
    """A cell: the metric as a bar, its interval as a line in it."""
    value = run.content["metrics"].get(metric, 0.0)
    return f'<td class="bar">{track(value, ends_of(run, metric), end, kind)}</td>'


def track(value: float, ends: Sequence[float], end: float, kind: str = "") -> str:
    def percent(number: float) -> float:
        return 100 * min(max(number / end, 0), 1) if math.isfinite(number) else 0.0

    line = ""
    if ends:
        left, right = map(percent, ends)
        line = f'<b style="left: {left:.2f}%; width: {right - left:.2f}%"></b>'
    return f'<div class="track"><i class="{kind}" style="width: {percent(value):.2f}%"></i>{line}</div>'


def summary(heading: str, head: str, rows: Sequence[str]) -> str:
    return (
        f'<h2>{heading}</h2><div class="card summary metrics"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def matrix(heading: str, runs: Sequence[ScoredRun], rows: Mapping[str, Sequence[str]], kind: str = "value") -> str:
    """Names and texts: of several runs in a column each.

    Args:
        kind: CSS classes of a cell; a value is on one line.
    """
    if len(runs) == 1:
        return facts_table(heading, [(name, cells[0]) for name, cells in rows.items()])
    texts = {escape(name): [escape(cell) for cell in cells] for name, cells in rows.items()}
    return scrolled(heading, ["", *(run.name for run in runs)], texts, kind=kind)


def scrolled(
    heading: str, head: Sequence[str], rows: Mapping[str, Sequence[str]], told: str = "", kind: str = "value"
) -> str:
    """A table that may be wider than the page; names of rows and cells are HTML."""
    titles = f"<th>{escape(head[0])}</th>" + "".join(f'<th class="value">{escape(name)}</th>' for name in head[1:])
    body = "".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f'<td class="{kind}">{cell}</td>' for cell in cells) + "</tr>"
        for name, cells in rows.items()
    )
    return (
        f"<h2>{heading}</h2>{f'<p class=quiet>{escape(told)}</p>' if told else ''}"
        f'<div class="card sources scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
    )
