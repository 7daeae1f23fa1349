"""The page of scored runs, one or several side by side: a single file that asks for nothing.

Runs of one task stand together: their metrics with intervals, a paired test of every two, bars by category, what was
not as it should be, samples to look at, and what the numbers come from. Runs of other tasks have a part of their own.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmcore.evaluation import scored_gallery
from mmcore.evaluation.page import document
from mmcore.evaluation.scored_compare import Comparison, Difference
from mmcore.evaluation.scored_gallery import gallery
from mmcore.evaluation.scored_parts import (
    NONE,
    axis,
    axis_end,
    bar,
    between,
    colour,
    matrix,
    number,
    scale_of,
    scrolled,
    size_of,
    summary,
    track,
    value_of,
)
from mmcore.evaluation.scored_run import ScoredRun
from mmcore.evaluation.scores import best, shown

MANY_GROUPS = 60  # so many are folded away
FEW_SAMPLES = 30

STYLE = """
h1, h2, p { overflow-wrap: anywhere; }
.hero { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; margin: 10px 0 24px; }
.hero b { font-size: 40px; line-height: 1.15; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
h1.another { margin-top: 64px; padding-top: 24px; border-top: 2px solid var(--line); }
.note.interval { white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { width: 36%; min-width: 120px; vertical-align: middle; }
.track { position: relative; height: 12px; border-radius: 3px; background: var(--soft); overflow: hidden; }
.track i, .track b { position: absolute; top: 0; bottom: 0; }
.track i { left: 0; min-width: 2px; background: var(--colour, var(--accent)); }
.track b { top: 5px; bottom: 5px; min-width: 2px; background: var(--ink); }
.between { display: block; font-size: 12px; font-weight: 400; color: var(--quiet); }
th .dot { margin-right: 8px; }
.scroll { overflow-x: auto; }
.scroll tbody th { min-width: 110px; overflow-wrap: anywhere; }
.sources.scroll td.text { min-width: 150px; white-space: normal; overflow-wrap: anywhere; text-align: right; }
.sources.scroll thead th {
  min-width: 84px; max-width: 220px; white-space: normal; overflow-wrap: anywhere; vertical-align: bottom;
}
.groups { padding: 12px 16px; }
.groups > div { columns: 2 400px; column-gap: 32px; }
.groups summary { cursor: pointer; color: var(--accent); }
.group {
  display: grid; grid-template-columns: minmax(0, 38%) 1fr max-content; gap: 0 10px; align-items: center;
  padding: 6px 0; break-inside: avoid; font-size: 14px; line-height: 18px;
}
.group > span { overflow-wrap: anywhere; }
.group div { display: grid; gap: 4px; }
.group .track { height: 10px; margin: 4px 0; }
.group .value { font-size: 13px; }
.list { margin: 0; padding: 12px 16px 12px 32px; overflow-wrap: anywhere; }
.list.warning { color: var(--notice); }
@media (max-width: 600px) {
  .hero b { font-size: 32px; }
  .metrics tr { grid-template-columns: 1fr auto; gap: 2px 12px; }
  .metrics .interval { grid-column: 1 / -1; text-align: right; }
  .metrics .interval:empty { display: none; }
  .metrics .bar { grid-column: 1 / -1; width: auto; padding: 4px 0; }
  .sources.scroll tbody th { white-space: normal; }
  .metrics td.scale { grid-column: 1 / -1; text-align: left; }
}
"""


def scored_page(title: str, tasks: Mapping[str, Comparison], limit: int) -> bytes:
    """The page.

    Args:
        tasks: each with its runs.
        limit: of samples to look at, for each task.
    """
    parts = {task: _task(found, limit) for task, found in tasks.items()}
    body = "".join(parts.values())
    if len(parts) > 1:
        body = f'<p class="quiet">{len(parts)} tasks, whose scores say nothing about each other.</p>'
        body += "".join(f'<h1 class="another">{escape(task)}</h1>{part}' for task, part in parts.items())
    return document(title, body, style=scored_gallery.STYLE + STYLE, script=scored_gallery.SCRIPT)


def _task(found: Comparison, limit: int) -> str:
    runs = found.runs
    head = [_hero(runs[0]), _metrics(runs[0])]
    if len(runs) > 1:
        head = [_contrasts(found), _runs(runs), _metrics_of_runs(runs), _differences(found)]
    samples = gallery(runs, limit, found.problem)
    return "\n".join([*head, _groups(runs), _counts(runs), _notes(runs), samples, _origin(runs)])


def _hero(run: ScoredRun) -> str:
    metric = run.content["metric"]
    told = [f"{metric}, {scale_of(run, metric)}", f"95 % {between(run, metric)}" if between(run, metric) else ""]
    words = " \u00b7 ".join(filter(None, [*told, size_of(run)]))
    return f'<p class="hero"><b>{value_of(run, metric)}</b><span class="quiet">{escape(words)}</span></p>'


def _metrics(run: ScoredRun) -> str:
    """A row for each metric of one run."""
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>{number(run, name)}{bar(run, name, end)}'
        f'<td class="note scale">{escape(told)}</td></tr>'
        for name in run.content["metrics"]
        for end, told in [axis([run], name)]
    ]
    rows += [
        f'<tr><th scope="row">{escape(name)}</th><td class="value">{NONE}</td>'
        f'<td class="note" colspan="3">left out: {escape(reason)}</td></tr>'
        for name, reason in run.content.get("skipped", {}).items()
    ]
    return summary("Metrics", '<th>metric</th><th class="value">value</th><th>95 %</th><th></th><th>scale</th>', rows)


def _runs(runs: Sequence[ScoredRun]) -> str:
    """A row for each run: the metric that the task is known by."""
    metric = runs[0].content["metric"]
    end, told = axis(runs, metric)
    rows = [
        f'<tr><th scope="row"><i class="dot {colour(row)}"></i>{escape(run.name)}</th>{number(run, metric)}'
        f'{bar(run, metric, end, colour(row))}<td class="note scale">{size_of(run)}</td></tr>'
        for row, run in enumerate(runs)
    ]
    head = f'<th>run</th><th class="value">{escape(metric)}</th><th>95 %</th><th>{escape(told)}</th><th></th>'
    return summary("Runs", head, rows)


def _metrics_of_runs(runs: Sequence[ScoredRun]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.content["metrics"])
    if len(names) == 1:
        return ""
    rows = {
        escape(name): [f'{value_of(run, name)}<span class="between">{between(run, name)}</span>' for run in runs]
        for name in names
    }
    return scrolled("Metrics", ["metric", *(run.name for run in runs)], rows)


def _differences(found: Comparison) -> str:
    if not found.differences:
        return ""
    runs = found.runs
    metric = runs[0].content["metric"]
    scale = scale_of(runs[0], metric)
    dots = {run.name: f'<i class="dot {colour(row)}"></i>{escape(run.name)}' for row, run in enumerate(runs)}
    rows = {
        f"{dots[row.second]} less {dots[row.first]}": [
            _signed(row, scale),
            f"{row.p_value:.{3 if row.p_value >= 0.001 else 4}f}",
            *(f"{count:,}" for count in (row.num_better, row.num_worse, row.num_same)),
        ]
        for row in found.differences
    }
    told = (
        "On the samples that both runs have: the difference of their mean scores with its 95 % interval, and how often "
        "chance alone would set the runs as far apart (paired permutation test, of each pair by itself). Better are "
        "samples on which the first named is."
    )
    if not all(row.is_of_metric for row in found.differences):
        told += f" The mean of the samples' scores is not {metric} itself."
    return scrolled("Differences", ["runs", "difference", "p", "better", "worse", "same"], rows, told)


def _signed(row: Difference, scale: str) -> str:
    ends = " to ".join(f"{'+' if end > 0 else ''}{shown(end, scale)}" for end in row.interval or ())
    sign = "+" if row.value > 0 else ""
    return f'{sign}{shown(row.value, scale)}<span class="between">{ends}</span>'.replace("-", "\u2212")


def _groups(runs: Sequence[ScoredRun]) -> str:
    """Bars by category, of each kind of categories."""
    scale = scale_of(runs[0], runs[0].content["metric"])
    found = [run.content.get("groups", {}) for run in runs]
    sections = []
    for kind in dict.fromkeys(kind for groups in found for kind in groups):
        of_runs = [groups.get(kind, {}) for groups in found]
        names = dict.fromkeys(name for groups in of_runs for name in groups)
        end = axis_end(scale, [group["score"] for groups in of_runs for group in groups.values()])
        rows = "".join(_group(name, [groups.get(name) for groups in of_runs], scale, end) for name in names)
        body = f"<div>{rows}</div>"
        if len(names) > MANY_GROUPS:
            body = f"<details><summary>{len(names)} of them</summary>{body}</details>"
        told = f'<p class="quiet">Bars end at {end:g}.</p>' if end != best(scale) else ""
        sections.append(
            f'<h2>By {escape(kind.replace("_", " "))}</h2>{told}{_legend(runs)}<div class="card groups">{body}</div>'
        )
    return "".join(sections)


def _group(name: str, groups: Sequence[Mapping[str, Any] | None], scale: str, end: float) -> str:
    tracks = "".join(
        track(group["score"] if group else 0.0, (), end, colour(row) if len(groups) > 1 else "")
        for row, group in enumerate(groups)
    )
    values = "".join(f"<span>{shown(group['score'], scale) if group else NONE}</span>" for group in groups)
    sizes = dict.fromkeys(f"{group['num_samples']:,}" for group in groups if group)
    label = escape(name).replace("_", "_<wbr>")
    return (
        f'<div class="group"><span>{label} <span class="quiet">{", ".join(sizes)}</span></span>'
        f'<div>{tracks}</div><div class="value">{values}</div></div>'
    )


def _legend(runs: Sequence[ScoredRun]) -> str:
    if len(runs) == 1:
        return ""
    names = "".join(f'<span class="{colour(row)}"><i></i>{escape(run.name)}</span>' for row, run in enumerate(runs))
    return f'<p class="legend">{names}</p>'


def _counts(runs: Sequence[ScoredRun]) -> str:
    counts = [run.content.get("counts", {}) for run in runs]
    rows = {name: [f"{row[name]:,}" if name in row else NONE for row in counts] for name in _keys(counts)}
    return matrix("Not as it should be", runs, rows) if rows else ""


def _contrasts(found: Comparison) -> str:
    told = "".join(f"<li>{escape(text)}</li>" for text in found.contrasts)
    count = f'<p class="quiet">{len(found.runs)} runs side by side</p>'
    return count + (f'<div class="card"><ul class="list warning">{told}</ul></div>' if told else "")


def _notes(runs: Sequence[ScoredRun]) -> str:
    """What is said of several runs is said once."""
    notes: dict[str, list[str]] = {}
    for run in runs:
        left_out = [f"{name} left out: {reason}" for name, reason in run.content.get("skipped", {}).items()]
        for note in dict.fromkeys([*run.content.get("notes", []), *left_out]):
            notes.setdefault(note, []).append(run.name)
    items = ""
    for note, names in notes.items():
        whose = f"{', '.join(names)}: " if len(names) < len(runs) else ""
        items += f"<li>{escape(whose + note)}</li>"
    if any(run.content["num_samples"] < FEW_SAMPLES and run.content.get("intervals") for run in runs):
        items += f"<li>Intervals of fewer than {FEW_SAMPLES} samples are rough, and mostly too narrow.</li>"
    return f'<h2>Notes</h2><div class="card"><ul class="list">{items}</ul></div>' if items else ""


def _origin(runs: Sequence[ScoredRun]) -> str:
    """What the numbers come from: scorer, options, files."""
    scorers = [run.content.get("scorer", {}) for run in runs]
    inputs = [run.content.get("inputs", {}) for run in runs]
    digits = 64 if len(runs) == 1 else 12
    rows = {key: [str(scorer.get(key, NONE)) for scorer in scorers] for key in _keys(scorers)}
    rows |= {
        role: [f"{files[role]['file']}, sha256 {files[role]['sha256'][:digits]}" for files in inputs]
        for role in _keys(inputs)
        if all(role in files for files in inputs)
    }
    return matrix("Where it comes from", runs, rows, kind="note text")


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [*dict.fromkeys(key for row in rows for key in row)]
