"""The curves of a training run, as the figures of its page."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from mmcore.evaluation.curves import Line, chart, smooth
from mmcore.evaluation.run_files import Row, RunRecord, mean, stages, values

# Lines of one chart that can be told apart; sources beyond are in the table alone.
NUM_COLOURS = 8


def figures(record: RunRecord) -> list[str]:
    """All of them; what the log has no numbers for is left out."""
    return [
        _figure("Loss", _loss_told(record), _loss_lines(record), loss_picture(record)),
        *_source_figures(record),
        _columns(record, "Learning rate", "lr", lr=""),
        _columns(record, "Gradient norm, before clipping", "norm", is_noisy=True, grad_norm=""),
        _columns(
            record, "Speed", "tokens/s", is_noisy=True, tokens_per_s="all positions", trained_tokens_per_s="trained"
        ),
        _columns(record, "Rows and time", "share", is_noisy=True, fill="rows filled", data_wait="waiting for data"),
        _columns(record, "Memory, peak of the first rank", "GiB", memory_gib=""),
        *_score_figures(record),
    ]


def loss_picture(record: RunRecord, style: str = "") -> str:
    """The loss of each step, its mean and the validation loss in one chart.

    Args:
        style: as of `curves.chart`.
    """
    bad_steps = [row["step"] for row in record.steps if row.get("fault")]
    return _chart(record, "Loss", _loss_lines(record), "loss", bad_steps=bad_steps, style=style)


def window(rows: Sequence[Row]) -> int:
    """Steps of the moving average: a fiftieth of the run."""
    return max(1, len(rows) // 50)


def source_names(record: RunRecord) -> list[str]:
    """Sources of the data, those with most trained tokens first; none where there is but one."""
    tokens: dict[str, float] = {}
    for row in record.steps:
        for name, share in row.get("sources", {}).items():
            tokens[name] = tokens.get(name, 0.0) + share["num_tokens"]
    return sorted(tokens, key=lambda name: -tokens[name])


def short(number: float) -> str:
    """Three digits that count."""
    return "-" if math.isnan(number) else f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _loss_lines(record: RunRecord) -> list[Line]:
    rows, every = record.steps, window(record.steps)
    losses = values(rows, "loss")
    lines = [Line(_steps(rows), smooth(losses, every), "mean", f"mean of {every} steps" if every > 1 else "loss")]
    if every > 1:
        lines.insert(0, Line(_steps(rows), losses, "raw", "one step"))
    if record.validation:
        lines.append(Line(_steps(record.validation), values(record.validation, "loss"), "mean c1", "validation"))
    return lines


def _loss_told(record: RunRecord) -> str:
    told = f"at the end {short(mean(values(record.steps[-window(record.steps) :], 'loss')))}"
    if record.validation:
        told += f", validation {short(values(record.validation[-1:], 'loss')[0])}"
    return told


def _columns(record: RunRecord, title: str, unit: str, *, is_noisy: bool = False, **columns: str) -> str:
    """Numbers of the log by step; nothing where it has none of them.

    Args:
        is_noisy: whether their moving average is drawn as well, from 0 on where there are several.
        columns: name in the log to name in the legend.
    """
    rows, lines, told = record.steps, [], []
    for number, (column, name) in enumerate(columns.items()):
        numbers = values(rows, column)
        if not any(map(math.isfinite, numbers)):
            continue
        if is_noisy:
            lines.append(Line(_steps(rows), numbers, f"raw c{number}"))
            numbers = smooth(numbers, window(rows))
        lines.append(Line(_steps(rows), numbers, f"mean c{number}", name))
        told.append(f"mean {short(mean(numbers))}" if is_noisy else f"at the end {short(numbers[-1])}")
    if not lines:
        return ""
    svg = _chart(record, title, lines, unit, is_linear=len(columns) > 1)
    return _figure(title, " and ".join(told), lines, svg)


def _source_figures(record: RunRecord) -> list[str]:
    found, every = source_names(record), window(record.steps)
    hidden = f"{len(found) - NUM_COLOURS} more in the table" if len(found) > NUM_COLOURS else ""
    drawn = []
    for title, rows, size in (
        ("Loss by source", record.steps, every),
        ("Validation loss by source", record.validation, 1),
    ):
        lines = []
        for number, name in enumerate(found[:NUM_COLOURS]):
            taken = [row for row in rows if row.get("sources", {}).get(name, {}).get("num_tokens")]
            if taken:
                losses = smooth(values(taken, "sources", name, "loss"), size)
                lines.append(Line(_steps(taken), losses, f"mean c{number}", name))
        if lines:
            told = ", ".join(filter(None, (f"mean of {size} steps" if size > 1 else "", hidden)))
            drawn.append(_figure(title, told, lines, _chart(record, title, lines, "loss")))
    return drawn


def _score_figures(record: RunRecord) -> list[str]:
    """One for each metric of each task."""
    drawn = []
    for task, metric in dict.fromkeys((row["task"], name) for row in record.scores for name in row["metrics"]):
        rows = [row for row in record.scores if row["task"] == task and metric in row["metrics"]]
        line = Line(_steps(rows), values(rows, "metrics", metric))
        told, svg = f"at the end {short(line.values[-1])}", _chart(record, metric, [line], metric)
        drawn.append(_figure(f"Score: {task}, {metric}", told, [line], svg))
    return drawn


def _chart(record: RunRecord, title: str, lines: Sequence[Line], unit: str, **options: Any) -> str:
    """A chart over all steps of the run so far, with its stages."""
    planned = stages(record)
    starts = [
        (before["until"] + 1, stage["name"] or str(number))
        for number, (before, stage) in enumerate(pairwise(planned), 2)
    ]
    ends = (record.steps[0]["step"], record.steps[-1]["step"])
    return chart(f"{title} of {record.name} by step", lines, unit=unit, stages=starts, span=ends, **options)


def _figure(title: str, told: str, lines: Sequence[Line], drawn: str) -> str:
    named = [line for line in lines if line.name]
    entries = "".join(f'<span><i class="{line.kind}"></i>{escape(line.name)}</span>' for line in named)
    legend = f'<p class="legend">{entries}</p>' if len(named) > 1 else ""
    return (
        f'<figure class="card"><figcaption><b>{escape(title)}</b><span class="quiet">{escape(told)}</span></figcaption>'
        f"{legend}{drawn}</figure>"
    )


def _steps(rows: Sequence[Row]) -> list[int]:
    return [row["step"] for row in rows]
