"""report.html and loss.svg of a training run, from the run's own files alone."""

import math
from collections.abc import Sequence
from datetime import timedelta
from html import escape
from pathlib import Path

from mmcore.evaluation.page import CHARTS, COLOURS, document, facts_table
from mmcore.evaluation.run_charts import figures, loss_picture, short, source_names, window
from mmcore.evaluation.run_files import RunRecord, changed_options, mean, read_run, stages, total, values
from mmcore.evaluation.scores import write_whole

REPORT_FILE, PICTURE_FILE = "report.html", "loss.svg"

# Bad steps that are told one by one.
NUM_FAULTS = 50

STYLE = ".plain { margin: 0; padding: 12px 16px 12px 32px; } .facts code { overflow-wrap: anywhere; }"
PICTURE_STYLE = f"{COLOURS}{CHARTS} svg {{ background: var(--card); }}"


def write_run_page(run: Path) -> Path:
    """Write both files, each whole or not at all.

    Returns:
        The page.
    Raises:
        ValueError: the run's files cannot be read, or these cannot be written.
    """
    record = read_run(run)
    sections = (_verdict, _curves, _facts, _sources, _stages, _faults, _options)
    body = "\n".join(filter(None, (section(record) for section in sections)))
    write_whole(run / REPORT_FILE, document(record.name, body, style=STYLE))
    if any(map(math.isfinite, values(record.steps, "loss"))):
        write_whole(run / PICTURE_FILE, loss_picture(record, PICTURE_STYLE).encode("utf-8", "replace"))
    return run / REPORT_FILE


def _verdict(record: RunRecord) -> str:
    done, planned = record.steps[-1]["step"], record.num_steps
    kind, told = ("right", "finished") if done >= planned else ("notice", "not finished")
    if fault := kind == "notice" and record.steps[-1].get("fault"):
        kind, told = "wrong", f"stopped: {fault}"
    return (
        f'<p class="quiet">Training run, {done:,} of {planned:,} steps</p>'
        f'<p><span class="mark verdict {kind}">{escape(told)}</span></p>'
    )


def _curves(record: RunRecord) -> str:
    return f'<h2>Curves</h2><div class="curves">{"".join(figures(record))}</div>'


def _facts(record: RunRecord) -> str:
    rows, last = record.steps, record.steps[-1]
    seconds, positions = total(rows, "seconds"), total(rows, "num_positions")
    faults = sum(bool(row.get("fault")) for row in rows)
    memory = [gib for gib in values(rows, "memory_gib") if math.isfinite(gib)]
    facts = [
        ("Steps", f"{last['step']:,} of {record.num_steps:,}"),
        ("Time in steps", str(timedelta(seconds=round(seconds)))),
        ("Samples", f"{total(rows, 'num_samples'):,.0f}"),
        ("Tokens, pictures included", f"{positions:,.0f}"),
        ("Tokens trained", f"{total(rows, 'num_tokens'):,.0f}"),
        ("Speed", f"{positions / seconds:,.0f} tokens/s" if positions and seconds else "-"),
        ("Rows filled", _percent(mean(values(rows, "fill")))),
        ("Waiting for data", _percent(mean(values(rows, "data_wait")))),
        ("Peak memory, first rank", f"{short(max(memory, default=math.nan))} GiB"),
        ("Samples skipped, first replica", f"{last.get('skipped', 0):,}"),
        ("Samples cut, first replica", f"{last.get('cut', 0):,}"),
        ("Bad steps and rewinds", f"{faults:,}" if faults else "none"),
        ("Checkpoints", _checkpoints(record)),
    ]
    return facts_table("Run", [*facts, *_start_facts(record)])


def _checkpoints(record: RunRecord) -> str:
    if not record.checkpoints:
        return "none"
    older = len(record.checkpoints) - 2
    return (f"{older:,} and " if older > 0 else "") + ", ".join(record.checkpoints[-2:])


def _start_facts(record: RunRecord) -> list[tuple[str, str]]:
    """What the jobs said of themselves."""
    if not record.starts:
        return []
    first, last = record.starts[0], record.starts[-1]
    again = [f"{start['step']:,}" for start in record.starts[1:]]
    parallel, replicas = record.config["parallel"], last["data_parallel_size"]
    # What the ranks are the product of; virtual stages are chunks on the same ranks.
    sizes = {name.partition("_")[0]: size for name, size in parallel.items() if name.endswith("_parallel_size")}
    layout = [f"{name} {size}" for name, size in {**sizes, "data": replicas}.items() if name != "virtual"]
    counts = last["parameters"]
    return [
        ("Began", f"{first['time'].replace('T', ' ').replace('+00:00', ' UTC')} on {first['host']}"),
        ("Began again after step", ", ".join(again) or "never"),
        ("Layout", f"{' x '.join(layout)}, {last['world_size']} ranks on {last['device']}"),
        ("Parameters", f"{sum(counts.values()):,}"),
        *((f"Parameters of {name}", f"{count:,}") for name, count in counts.items()),
    ]


def _sources(record: RunRecord) -> str:
    rows = []
    for name in source_names(record):
        taken = [row["sources"][name] for row in record.steps if name in row.get("sources", {})]
        tokens = [share for share in taken if share["num_tokens"]]
        told = [share for row in record.validation if (share := row.get("sources", {}).get(name))]
        cells = [f"{total(taken, key):,.0f}" for key in ("num_samples", "num_positions", "num_tokens")]
        cells += [short(mean(values(tokens[-window(record.steps) :], "loss")))]
        cells += [short(told[-1]["loss"]) if told else "-"]
        cells += [f"{taken[-1].get(key, 0):,}" for key in ("skipped", "cut")]
        rows.append([name, *cells])
    head = ["source", "samples", "tokens", "trained", "loss", "validation", "skipped", "cut"]
    return _table("Sources", head, rows) if rows else ""


def _stages(record: RunRecord) -> str:
    """What each stage trained; of a run without stages one row."""
    if not record.starts:
        return ""
    config, trained = record.config, record.starts[-1]["trained"]
    begins = 1
    rows = []
    for number, (stage, count) in enumerate(zip(stages(record), trained, strict=True), 1):
        end = stage["until"] or record.num_steps
        rate = stage["lr"] or config["optimizer"]["lr"]
        frozen = " ".join(stage["freeze"]) or "nothing"
        rows.append([stage["name"] or str(number), f"{begins:,} to {end:,}", f"{rate:.2e}", f"{count:,}", frozen])
        begins = end + 1
    return _table("Stages", ["stage", "steps", "highest lr", "parameters trained", "frozen"], rows)


def _faults(record: RunRecord) -> str:
    found = [row for row in record.steps if row.get("fault")]
    if not found:
        return ""
    items = "".join(f"<li>step {row['step']:,}: {escape(str(row['fault']))}</li>" for row in found[:NUM_FAULTS])
    more = f"<li>and {len(found) - NUM_FAULTS:,} more in log.jsonl</li>" if len(found) > NUM_FAULTS else ""
    return f'<h2>Bad steps</h2><div class="card"><ul class="plain">{items}{more}</ul></div>'


def _options(record: RunRecord) -> str:
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th><td class="note"><code>{escape(text)}</code></td></tr>'
        for name, text in changed_options(record.config)
    )
    told = '<p class="quiet">Those that differ from what an option is without a recipe.</p>'
    table = f'<div class="card facts"><table><tbody>{rows}</tbody></table></div>'
    return f"<h2>Options</h2>{told}{table}" if rows else ""


def _table(heading: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = f"<th>{head[0]}</th>" + "".join(f'<th class="value">{title}</th>' for title in head[1:])
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="value">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<h2>{heading}</h2><div class="card sources"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"
