"""What was answered, right and wrong, with pictures: the part of a scored run's page that is searched and filtered."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, zip_longest
from pathlib import Path
from statistics import median

from mmcore.evaluation.scored_parts import colour
from mmcore.evaluation.scored_run import ScoredRun
from mmcore.evaluation.scores import Sample
from mmcore.evaluation.thumbnail import data_uri

EDGE = 320  # pixels of a thumbnail
SMALL = 128  # pixels; smaller pictures are enlarged without blur
MAX_PICTURES = 4  # of one sample
MAX_TEXT = 2000  # characters
MAX_REFERENCES = 12

STYLE = """
.browser select {
  padding: 7px 10px; border: 1px solid var(--line); border-radius: 8px; max-width: 100%;
  background: var(--card); color: inherit; font: inherit;
}
.browser .choice { flex-wrap: wrap; }
.browser small { opacity: 0.7; margin-left: 3px; }
.browser .gallery { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); align-items: start; }
.browser .item .head { align-items: baseline; }
.browser .item .head > span:first-child { overflow-wrap: anywhere; min-width: 0; }
.browser .partly .mark, .browser .mark.partly { color: var(--notice); background: var(--notice-soft); }
.browser .plain .mark, .browser .mark.plain { color: var(--quiet); background: var(--soft); }
.browser .several { display: grid; grid-template-columns: 1fr 1fr; background: var(--soft); }
.browser .several img { height: 130px; padding: 6px; }
.browser .prompt, .browser dd { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.browser .prompt, .browser dd { max-height: 13em; overflow-y: auto; }
.browser dt { display: flex; align-items: baseline; gap: 6px; }
.browser dt .mark { font-size: 12px; padding: 0 7px; margin-left: auto; }
.browser dd.read { color: var(--quiet); font-size: 13px; }
.dot {
  display: inline-block; flex: none; width: 9px; height: 9px; border-radius: 99px;
  background: var(--colour, var(--accent));
}
"""

# Every gallery of the page: shows a portion of the items that the buttons, the group and the search leave.
SCRIPT = """
for (const browser of document.querySelectorAll(".browser")) {
  const items = [...browser.querySelectorAll(".item")], buttons = [...browser.querySelectorAll(".choice button")];
  const search = browser.querySelector("input"), group = browser.querySelector("select");
  const more = browser.querySelector(".more"), found = browser.querySelector(".found"), page = 48;
  const texts = items.map(item => item.textContent.toLowerCase());
  let kind = "", limit = page;
  const show = () => {
    const words = search.value.toLowerCase().split(/\\s+/);
    let count = 0;
    items.forEach((item, index) => {
      const fits = (!kind || item.dataset.kind === kind) && (!group?.value || item.dataset.group === group.value)
        && words.every(word => texts[index].includes(word));
      item.hidden = !fits || ++count > limit;
    });
    more.hidden = count <= limit;
    found.textContent = `${count} of ${items.length}`;
  };
  const anew = () => { limit = page; show(); };
  for (const button of buttons) button.onclick = () => {
    kind = button.value;
    for (const other of buttons) other.setAttribute("aria-pressed", other === button);
    anew();
  };
  search.oninput = anew;
  if (group) group.onchange = anew;
  more.onclick = () => { limit += page; show(); };
  show();
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorting:
    """Samples by what became of them."""

    labels: Mapping[str, str]
    """Kind to what a reader calls it, in the order of the buttons."""
    first: frozenset[str]
    """Kinds that are shown before the others."""
    kinds: Mapping[str, str]
    """Id of a sample to its kind."""
    is_graded: bool
    """Whether a score says how good an answer is, rather than whether it is right."""


def gallery(runs: Sequence[ScoredRun], limit: int, problem: str = "") -> str:
    """HTML of some samples of runs of one task; nothing where none were kept.

    Args:
        limit: of samples; by chance, as many of each kind as there are, but those in which runs differ first.
        problem: why there are no pictures.
    """
    colours = {run.name: colour(row) for row, run in enumerate(runs)}
    runs, strangers = _acquainted(runs)
    ids = [name for name in runs[0].samples if all(name in run.samples for run in runs)] if runs else []
    if not runs or not limit:
        return ""
    if not ids:
        return '<h2>Samples</h2><p class="quiet">There is no sample that all runs have.</p>'
    sorting = sort_samples(runs, ids)
    shown = choose(sorting, limit)
    problems: list[str] = []
    prompts = {sample.prompt for run in runs for sample in run.samples.values()}
    asked = prompts.pop() if len(prompts) == 1 else ""
    groups = {name: str(row) for row, name in enumerate(sorted({runs[0].samples[name].group for name in shown}))}
    items = "".join(_item(runs, colours, name, sorting, groups, problems, is_asked=not asked) for name in shown)
    others = len({name for run in runs for name in run.samples}) - len(ids)
    notes = [
        f"Asked of each: {asked[:MAX_TEXT]}" if asked else "",
        f"{len(shown):,} of {len(ids):,} samples, chosen by chance." if len(shown) < len(ids) else "",
        f"{others:,} samples are not in every run: they are left out here." if others else "",
        f"{', '.join(strangers)}: none of these samples." if strangers else "",
        f"No pictures: {problem}" if problem else "",
        f"{len(problems):,} pictures cannot be shown, the first: {problems[0]}." if problems else "",
    ]
    told = "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes if note)
    return (
        f'<section class="browser"><h2>Samples</h2>{told}{_tools(sorting, shown, groups)}'
        f'<div class="gallery">{items}</div><button class="more" hidden>Show more</button></section>'
    )


def _acquainted(runs: Sequence[ScoredRun]) -> tuple[list[ScoredRun], list[str]]:
    """Runs that have samples in common with the first that has any, and the names of the others."""
    first = next((run for run in runs if run.samples), None)
    if first is None:
        return [], []
    known = [run for run in runs if run.samples.keys() & first.samples.keys()]
    names = {run.name for run in known}
    return known, [run.name for run in runs if run.name not in names]


def sort_samples(runs: Sequence[ScoredRun], ids: Sequence[str]) -> Sorting:
    """Of one run by how good its answers are, of two by which is better, of more by whether they differ."""
    scores = {name: [run.samples[name].score for run in runs] for name in ids}
    every = [score for row in scores.values() for score in row]
    is_graded = not all(0 <= score <= 1 for score in every) or sum(score in (0, 1) for score in every) < len(every) / 2
    middle = median(every)
    if is_graded:
        same = {"low": f"Below {middle:.2f}", "high": f"{middle:.2f} or more"}
    else:
        same = {"wrong": "Wrong", "partly": "Partly right", "right": "Right"}
    if len(runs) == 1:
        differing: dict[str, str] = {}
    elif len(runs) == 2:
        differing = {"first": f"{runs[0].name} better", "second": f"{runs[1].name} better"}
    else:
        differing = {"differ": "Runs differ"}
    if differing:
        same = {"same": "Same"} if is_graded else {kind: f"All {label.lower()}" for kind, label in same.items()}

    def kind(row: Sequence[float]) -> str:
        if len(set(row)) > 1:
            return "differ" if len(row) > 2 else "first" if row[0] > row[1] else "second"
        if is_graded:
            return "same" if differing else "low" if row[0] < middle else "high"
        return "right" if row[0] == 1 else "wrong" if row[0] == 0 else "partly"

    kinds = {name: kind(row) for name, row in scores.items()}
    return Sorting(labels={**differing, **same}, first=frozenset(differing), kinds=kinds, is_graded=is_graded)


def choose(sorting: Sorting, limit: int) -> list[str]:
    """Ids of the samples to show: by chance, always the same ones, in their own order."""
    chosen: list[str] = []
    for is_first in (True, False):
        pools: dict[str, list[str]] = {}
        for name, kind in sorting.kinds.items():
            if (kind in sorting.first) is is_first:
                pools.setdefault(kind, []).append(name)
        for pool in pools.values():
            random.Random(0).shuffle(pool)
        turns = chain.from_iterable(zip_longest(*pools.values()))
        taken = set([name for name in turns if name is not None][: max(0, limit - len(chosen))])
        chosen += [name for name in sorting.kinds if name in taken]
    return chosen


def _tools(sorting: Sorting, shown: Sequence[str], groups: Mapping[str, str]) -> str:
    counts = Counter(sorting.kinds[name] for name in shown)
    choices = {"": "All", **sorting.labels}
    buttons = "".join(
        f'<button value="{kind}" aria-pressed="{str(not kind).lower()}">{escape(label)} '
        f"<small>{counts[kind] if kind else len(shown):,}</small></button>"
        for kind, label in choices.items()
        if not kind or counts[kind]
    )
    options = "".join(f'<option value="{key}">{escape(name or "no group")}</option>' for name, key in groups.items())
    select = f'<select aria-label="Group"><option value="">every group</option>{options}</select>'
    return (
        f'<div class="tools"><div class="choice">{buttons}</div>{select if len(groups) > 1 else ""}'
        '<input type="search" placeholder="Search texts" aria-label="Search texts">'
        '<span class="quiet found" aria-live="polite"></span></div>'
    )


def _item(
    runs: Sequence[ScoredRun],
    colours: Mapping[str, str],
    name: str,
    sorting: Sorting,
    groups: Mapping[str, str],
    problems: list[str],
    *,
    is_asked: bool,
) -> str:
    samples = [run.samples[name] for run in runs]
    images = next((sample.images for sample in samples if sample.images), ())
    prompt = next((sample.prompt for sample in samples if sample.prompt and is_asked), "")
    place = " \u00b7 ".join(filter(None, (name, samples[0].group)))
    counted = Counter(samples[0].references).most_common(MAX_REFERENCES)
    references = "".join(f"<dd>{_text(text)}{_times(count)}</dd>" for text, count in counted)
    if len(runs) == 1:
        mark, answers = _mark(samples[0], sorting.is_graded), _answer("answer", samples[0])
    else:
        mark, answers = "", ""
        for run, sample in zip(runs, samples, strict=True):
            dot = f'<i class="dot {colours[run.name]}"></i>'
            answers += _answer(f"{dot}{escape(run.name)}{_mark(sample, sorting.is_graded)}", sample)
    parts = [
        f'<article class="card item" data-kind="{sorting.kinds[name]}" data-group="{groups[samples[0].group]}">',
        _pictures(images, problems),
        f'<div class="head"><span class="quiet">{escape(place)}</span>{mark}</div>',
        f'<p class="prompt">{_text(prompt)}</p>' if prompt else "",
        f"<dl>{answers}",
        f"<dt>{'references' if len(counted) > 1 else 'reference'}</dt>{references}" if references else "",
        "</dl></article>",
    ]
    return "".join(parts)


def _answer(head: str, sample: Sample) -> str:
    read = ""
    if sample.parsed and sample.parsed != sample.answer:
        read = f'<dd class="read">read as {_text(sample.parsed)}</dd>'
    return f"<dt>{head}</dt><dd>{_text(sample.answer) or '&mdash;'}</dd>{read}"


def _times(count: int) -> str:
    return f" <small>\u00d7{count}</small>" if count > 1 else ""


def _mark(sample: Sample, is_graded: bool) -> str:
    if is_graded:
        return f'<span class="mark plain">{sample.score:.2f}</span>'
    kind = {0.0: "wrong", 1.0: "right"}.get(sample.score, "partly")
    return f'<span class="mark {kind}">{kind if kind != "partly" else f"{sample.score:.2f}"}</span>'


def _text(text: str) -> str:
    cut = len(text) - MAX_TEXT
    return escape(text if cut <= 0 else f"{text[:MAX_TEXT]} \u2026 ({cut:,} characters more in samples.jsonl)")


def _pictures(images: Sequence[Path | bytes], problems: list[str]) -> str:
    """Thumbnails; why one cannot be shown is added to `problems`."""
    tags = []
    for image in [image for image in images if image][:MAX_PICTURES]:
        try:
            uri, side = data_uri(image, EDGE)
        except ValueError as error:
            problems.append(f"{image}: {error}" if isinstance(image, Path) else str(error))
        else:
            tags.append(f'<img{" class=small" if side <= SMALL else ""} alt="" src="{uri}">')
    more = len(images) - MAX_PICTURES
    told = f'<p class="prompt">and {more} more pictures</p>' if more > 0 else ""
    return (f'<div class="several">{"".join(tags)}</div>' if len(tags) > 1 else "".join(tags)) + told
