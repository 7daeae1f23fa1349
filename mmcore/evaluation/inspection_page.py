"""The report of `mmcore inspect` as one self-contained HTML file.

It takes plain values, as they stand in report.json: this room knows nothing of samples and datasets.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmcore.evaluation.histogram import svg
from mmcore.evaluation.inspection_table import facts, share
from mmcore.evaluation.page import document, facts_table
from mmcore.evaluation.scores import write_whole

MORE_STYLE = """
:root { --control: #6b4bb8; --control-soft: #efe9fb; }
@media (prefers-color-scheme: dark) {
  :root { --control: #c3adff; --control-soft: #32264f80; }
}
.note p { margin: 0; }
.note summary { cursor: pointer; color: var(--accent); }
.note ul { margin: 4px 0 0; padding-left: 18px; overflow-wrap: anywhere; }
svg rect { fill: var(--accent); }
svg .limit { stroke: var(--wrong); stroke-dasharray: 5 4; }
.level { width: 40%; }
.level div { height: 8px; min-width: 2px; border-radius: 99px; background: var(--accent); }
.value span { font-weight: 400; }
.sample { padding: 14px 16px 16px; margin-bottom: 16px; }
.sample h3 { margin: 0 0 8px; font-size: 15px; font-weight: 600; overflow-wrap: anywhere; }
.sample h3 span { color: var(--quiet); font-weight: 400; font-size: 13px; }
.sample .error { margin: 0 0 8px; color: var(--wrong); overflow-wrap: anywhere; }
.sample .body { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; align-content: flex-start; }
.pictures figure { padding: 0; max-width: 100%; }
.pictures figcaption { display: block; margin: 0 0 4px; color: var(--quiet); font-size: 12px; }
.pictures img { display: block; max-width: 100%; max-height: 240px; min-width: 48px; border-radius: 6px; }
.pictures .squares { display: flex; flex-wrap: wrap; gap: 4px; }
.pictures .squares img { max-height: 160px; border: 1px solid var(--line); }
.tokens { line-height: 2; overflow-wrap: anywhere; }
.t {
  padding: 2px 1px; margin: 0 1px 0 0; border-radius: 4px; background: var(--soft);
  white-space: pre-wrap; unicode-bidi: isolate;
  box-decoration-break: clone; -webkit-box-decoration-break: clone;
  font: 13px ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
.t.trained { background: var(--right-soft); box-shadow: inset 0 -2px var(--right); }
.t.control { color: var(--control); background: var(--control-soft); padding: 2px 5px; }
.t.control.trained { background: var(--right-soft); }
.t.image { color: var(--card); background: var(--accent); padding: 2px 8px; white-space: nowrap; }
.t.unknown { color: var(--wrong); background: var(--wrong-soft); padding: 2px 5px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 14px; font-size: 14px; color: var(--quiet); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
@media (min-width: 760px) { .sample .body.two { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); } }
@media (max-width: 600px) {
  .findings tr { grid-template-columns: 1fr auto; }
  .findings .note { grid-column: 1 / -1; grid-row: 3; }
  .findings td:last-child { grid-row: 1; grid-column: 2; }
  .findings .value { grid-row: 2; grid-column: 1 / -1; text-align: left; }
  .level { grid-column: 1 / -1; width: auto; }
}
"""

# What cannot be seen otherwise; whatever else cannot is spelled as in Python.
VISIBLE = {"\n": "\u21b5\n", "\t": "\u21e5"}


def write_page(path: Path, report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the report, whole or not at all.

    Args:
        report: as `mmcore.data.findings.report` gives it.
        shown: samples, each as `mmcore.data.shown.show` gives it.
    Raises:
        ValueError: the file cannot be written.
    """
    title = f"{Path(report['dataset']).name}, {report['split']}"
    verdict = ("right", "nothing would hurt a run") if report["passed"] else ("wrong", "this would hurt a run")
    body = f"""<p class="quiet">What is in the dataset, and what of it would hurt a run</p>
<p><span class="mark verdict {verdict[0]}">{verdict[1]}</span></p>
{_findings(report)}
{facts_table("Dataset", facts(report))}
{_histograms(report)}
{_padding(report)}
{_sources(report) if len(report["sources"]) > 1 else ""}
{_samples(shown) if shown else ""}"""
    write_whole(path, document(title, body, style=MORE_STYLE))


def _findings(report: Mapping[str, Any]) -> str:
    found = [finding for finding in report["findings"] if finding["count"]]
    rows = "".join(map(_finding, sorted(found, key=lambda finding: not finding["hurts"])))
    missing = [finding["title"] for finding in report["findings"] if not finding["count"]]
    if missing:
        rows += (
            f'<tr><th scope="row">also looked for</th><td class="value">0</td>'
            f'<td class="note">{escape("; ".join(missing))}</td><td><span class="mark right">none</span></td></tr>'
        )
    head = '<th>finding</th><th class="value">count</th><th>what it means</th><th></th>'
    return (
        f'<h2>Findings</h2><div class="card summary findings"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _finding(finding: Mapping[str, Any]) -> str:
    mark = ("wrong", "hurts") if finding["hurts"] else ("notice", "notice")
    sources = finding["by_source"]
    parts = [f"{name}: {count:,}" for name, count in sources.items()] if len(sources) > 1 else []
    by_source = f"<p>{escape(', '.join(parts))}</p>" if parts else ""
    return (
        f'<tr><th scope="row">{escape(finding["title"])}</th><td class="value">{finding["count"]:,}'
        f' <span class="quiet">{share(finding["count"], finding["of"])}</span></td>'
        f'<td class="note"><p>{escape(finding["meaning"])}</p>{by_source}{_examples(finding)}</td>'
        f'<td><span class="mark {mark[0]}">{mark[1]}</span></td></tr>'
    )


def _examples(finding: Mapping[str, Any]) -> str:
    examples = finding["examples"]
    if not examples:
        return ""
    told = f"the first {len(examples)}" if len(examples) < finding["count"] else "which"
    items = "".join(
        f"<li><code>{escape(' '.join(filter(None, (example['shard'], example['key']))))}</code> "
        f"{escape(example['detail'])}</li>"
        for example in examples
    )
    return f"<details><summary>{told}</summary><ul>{items}</ul></details>"


def _histograms(report: Mapping[str, Any]) -> str:
    figures = []
    for name, title, unit, limit in (
        ("lengths", "Tokens of a sample", "tokens", report["seq_length"]),
        ("pictures", "Pictures of a sample", "pictures", None),
    ):
        told = report[name]
        mean = "" if told["mean"] is None else f"mean {told['mean']:,.1f}"
        chart = svg(told["bins"], title=title, x_label=unit, y_label="samples", limit=limit)
        figures.append(
            f'<figure class="card"><figcaption><b>{title}</b><span class="quiet">{mean}</span></figcaption>'
            f"{chart}</figure>"
        )
    return f'<h2>Histograms</h2><div class="curves">{"".join(figures)}</div>'


def _padding(report: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="value">{share(value, 1)}</td>'
        f'<td class="level"><div style="width: {100 * value:.2f}%"></div></td></tr>'
        for name, value in report["padding"].items()
    )
    told = "Share of positions without a token, by how samples are put into rows." if rows else "No sample is usable."
    return f'<h2>Padding</h2><p class="quiet">{told}</p><div class="card"><table><tbody>{rows}</tbody></table></div>'


def _sources(report: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(source["name"])}</th>'
        + "".join(f'<td class="value">{value}</td>' for value in _source(source))
        + "</tr>"
        for source in report["sources"]
    )
    head = "".join(f'<th class="value">{name}</th>' for name in ("draws", "samples", "usable", "no picture", "trained"))
    return (
        f'<h2>Sources</h2><div class="card sources"><table><thead><tr><th>source</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _source(source: Mapping[str, Any]) -> tuple[str, ...]:
    samples = source["samples"]
    return (
        share(source["share_of_draws"], 1),
        f"{samples:,}",
        share(source["usable"], samples),
        share(source["text_only"], samples),
        share(source["trained_tokens"], source["tokens"]),
    )


def _samples(shown: Sequence[Mapping[str, Any]]) -> str:
    legend = (
        '<p class="legend"><span><span class="t">read</span> only read</span>'
        '<span><span class="t trained">trained</span> predicted, and so trained</span>'
        '<span><span class="t control">&lt;s&gt;</span> control token</span>'
        '<span><span class="t image">image</span> a picture\'s embeddings</span>'
        "<span>ids: point at a token</span></p>"
    )
    return f"<h2>Samples</h2>{legend}{''.join(map(_sample, shown))}"


def _sample(sample: Mapping[str, Any]) -> str:
    place = " ".join(filter(None, (sample["source"], sample["shard"])))
    error = f'<p class="error">{escape(sample["error"])}</p>' if sample["error"] else ""
    tokens = sum(len(piece["ids"]) for piece in sample["pieces"])
    trained = sum(len(piece["ids"]) for piece in sample["pieces"] if piece["trained"])
    told = f"{tokens:,} tokens, {trained:,} trained{', cut at the window' if sample['was_cut'] else ''}"
    pictures = _pictures(sample)
    text = (
        f'<div class="tokens">{"".join(map(_piece, sample["pieces"]))}</div>'
        if sample["pieces"]
        else f"<pre>{escape(sample['text'])}</pre>"
    )
    return (
        f'<article class="card sample"><h3>{escape(sample["key"] or "no key")} <span>{escape(place)}'
        f"{f', {told}' if tokens else ''}</span></h3>{error}"
        f'<div class="body{" two" if pictures else ""}">{pictures}{text}</div></article>'
    )


def _pictures(sample: Mapping[str, Any]) -> str:
    kinds = (("as it is", sample["pictures"]), ("as the model sees it", sample["squares"]))
    figures = [
        f'<figure><figcaption>{name}</figcaption><div class="squares">'
        f'{"".join(f"""<img alt="" src="{escape(uri)}">""" for uri in uris)}</div></figure>'
        for name, uris in kinds
        if uris
    ]
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _piece(piece: Mapping[str, Any]) -> str:
    ids, kind = piece["ids"], piece["kind"]
    if kind == "image":
        text = f"image \u00d7 {len(ids)}"
    elif kind == "unknown":
        text = f"id {ids[0]}"
    else:
        text = "".join(map(_visible, piece["text"]))
    told = f"id {ids[0]}" if kind == "image" else f"id {' '.join(map(str, ids))}"
    classes = " ".join(["t", *([kind] if kind != "text" else []), *(["trained"] if piece["trained"] else [])])
    return f'<span class="{classes}" title="{told}">{escape(text)}</span>'


def _visible(letter: str) -> str:
    if letter in VISIBLE or letter.isprintable():
        return VISIBLE.get(letter, letter)
    return letter.encode("unicode_escape").decode()
