"""The report of `mmcore inspect` for a terminal, however narrow and whatever its encoding."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmcore.evaluation.histogram import bar, lines

MAX_WIDTH = 110
BAR = 24


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print what `mmcore.data.findings.report` gives."""
    plain = console.options.ascii_only
    console.width = min(console.width, MAX_WIDTH)
    parts: list[RenderableType] = [_findings(report), _facts(report)]
    if len(report["sources"]) > 1:
        parts.append(_sources(report))
    for name, title in (("lengths", "tokens of a sample"), ("pictures", "pictures of a sample")):
        parts.append(Text(f"\n{title}", style="bold"))
        parts.append(Text("\n".join(lines(report[name]["bins"], console.width, ascii_only=plain)), no_wrap=True))
    console.print(Group(*parts, Text(), _padding(report, plain)))


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey, in ASCII."""
    return "".join(
        letter if letter.isascii() and letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def share(count: float, of: float) -> str:
    """A percentage that is 0 or 100 only if it is."""
    percent = 100 * count / of if of else 0.0
    if 0 < percent < 0.01:
        return "< 0.01 %"
    return f"{percent:.2f} %" if 99.99 >= percent > 0 else "> 99.99 %" if 99.99 < percent < 100 else f"{percent:.0f} %"


def _table(*titles: str, title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, name in enumerate(titles):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _findings(report: Mapping[str, Any]) -> Table:
    verdict = "nothing would hurt a run" if report["passed"] else "this would hurt a run"
    table = Table(box=box.SIMPLE_HEAD, title=f"findings: {verdict}", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    found = [finding for finding in report["findings"] if finding["count"]]
    for finding in sorted(found, key=lambda finding: not finding["hurts"]):
        mark = Text("hurts", style="bold red") if finding["hurts"] else Text("notice", style="yellow")
        what = Text(finding["title"])
        what.append(f" ({share(finding['count'], finding['of'])})\n", style="dim")
        what.append(finding["meaning"], style="dim")
        for example in finding["examples"]:
            place = " ".join(filter(None, (example["shard"], example["key"])))
            what.append(f"\n{printable(place)}{': ' if place else ''}{printable(example['detail'])}", style="cyan")
        table.add_row(mark, f"{finding['count']:,}", what)
    missing = [finding["title"] for finding in report["findings"] if not finding["count"]]
    if missing:
        table.add_row(Text("none", style="green"), "0", Text(f"also looked for: {'; '.join(missing)}", style="dim"))
    return table


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what is neither finding nor histogram."""
    counts, ids = report["counts"], report["token_ids"]
    tokens, used = counts["tokens"], ids["lowest_and_highest"]
    lengths = report["lengths"]["percentiles"]
    rows = [
        ("samples", f"{counts['samples']:,}" + ("" if _is_whole(report) else f" of {report['num_samples']:,}")),
        ("left out by the dataset's metadata", f"{counts['excluded']:,}"),
        ("pictures", "every one decoded" if report["pictures_decoded"] else "headers read, not decoded"),
        ("samples without a picture", share(counts["text only"], counts["samples"])),
        ("template, window", f"{report['conversation']}, {report['seq_length']:,} tokens"),
        ("tokens within the window", f"{tokens:,}"),
        ("tokens of pictures", share(counts["tokens of pictures"], tokens)),
        ("trained tokens", share(counts["trained tokens"], tokens)),
        ("tokens beyond the window", f"{counts['tokens beyond the window']:,}"),
        ("token ids of text", f"{used[0]:,} to {used[1]:,}" if used else "none"),
        ("tokenizer, model", f"{ids['tokenizer']:,} tokens, {ids['model']:,} rows"),
    ]
    if lengths:
        rows.insert(
            5,
            (
                "tokens of a sample",
                f"median {lengths['50']:,}, 99 % up to {lengths['99']:,}, at most {lengths['100']:,}",
            ),
        )
    return [row for row in rows if row != ("left out by the dataset's metadata", "0")]


def _is_whole(report: Mapping[str, Any]) -> bool:
    return bool(report["num_inspected"] == report["num_samples"])


def _facts(report: Mapping[str, Any]) -> Table:
    table = _table("", "", title="dataset")
    table.show_header = False
    for name, value in facts(report):
        table.add_row(name, value)
    return table


def _sources(report: Mapping[str, Any]) -> Table:
    table = _table("source", "draws", "samples", "usable", "no picture", title="sources")
    for source in report["sources"]:
        samples = source["samples"]
        table.add_row(
            printable(source["name"]),
            share(source["share_of_draws"], 1),
            f"{samples:,}",
            share(source["usable"], samples),
            share(source["text_only"], samples),
        )
    return table


def _padding(report: Mapping[str, Any], plain: bool) -> Table:
    table = _table("rows", "padding", "", title="padding")
    table.columns[2].justify = "left"
    table.columns[2].no_wrap = True
    for name, value in report["padding"].items():
        table.add_row(name, share(value, 1), bar(value, BAR, ascii_only=plain))
    return table
