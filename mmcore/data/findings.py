"""What was counted of a dataset, as a report: findings that would hurt a run, notices, and facts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmcore.data.dataset import Dataset
from mmcore.data.inspection import MAX_ENLARGED, Plan, open_plan
from mmcore.data.padding import draw, padding
from mmcore.data.tally import MAX_EXAMPLES, Tally

MAX_BINS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is looked for."""

    title: str
    meaning: str
    """What it does to a run, and the mend."""
    hurts: bool = True
    """Whether a run fails or trains on nothing by it; else it is a notice."""
    unit: str = "samples"


# By the names that the samples' tallies count them under.
FINDINGS = {
    "unreadable": Finding(
        title="samples that cannot be read",
        meaning="Their shard is damaged, and training skips them: copy it again, or prepare the dataset again.",
    ),
    "broken_picture": Finding(
        title="samples with a picture that cannot be used",
        meaning="Training skips them: prepare the dataset again, which leaves such rows out.",
    ),
    "missing_picture": Finding(
        title="samples that lack pictures",
        meaning="There are more image tags than pictures, and training skips them: prepare the dataset again.",
    ),
    "picture_without_place": Finding(
        title="samples with pictures that no text asks for",
        meaning="There are fewer image tags than pictures, and training skips them: prepare the dataset again.",
    ),
    "no_layout": Finding(
        title="samples that are no conversation",
        meaning="Training skips them: mend their rows and prepare the dataset again.",
    ),
    "nothing_trained": Finding(
        title="samples without a trained token",
        meaning="They have no answer, or it lies beyond the window, and training skips them.",
    ),
    "cut_picture": Finding(
        title="samples whose pictures do not fit into the window",
        meaning="No picture is cut: training skips them, or what is beyond the window. Raise the sequence length.",
    ),
    "longer": Finding(
        title="samples longer than the window",
        meaning="Their end is never trained on: raise the sequence length, or shorten them.",
    ),
    "outside_vocabulary": Finding(
        title="samples with token ids that the model has not",
        meaning="A run fails at the first: the tokenizer is another model's.",
    ),
    "repeated_key": Finding(
        title="samples whose key stands in their source twice",
        meaning="Keys tell samples apart, in ledgers and in energon's index: prepare the dataset again.",
    ),
    "too_few": Finding(
        title="samples missing for the number of readers",
        meaning="A run with so many readers does not start: give it fewer data parallel ranks or loader workers.",
    ),
    "repeated_picture": Finding(
        title="pictures that stand in the dataset twice",
        meaning="Usual where a picture has several conversations; else it is trained on more often than the others.",
        hurts=False,
        unit="pictures",
    ),
    "small_picture": Finding(
        title="tiny pictures",
        meaning=f"They are enlarged more than {MAX_ENLARGED} times: the model sees blur.",
        hurts=False,
        unit="pictures",
    ),
    "text_only": Finding(
        title="samples without a picture",
        meaning="The vision tower learns nothing from them.",
        hurts=False,
    ),
}


def report(plan: Plan, tallies: Sequence[Tally], *, max_longer: float, num_readers: int) -> dict[str, Any]:
    """All that was found, as plain values for JSON; the same samples give the same report.

    Args:
        tallies: of each of the dataset's sources.
        max_longer: largest fraction of samples longer than the window that is only a notice.
        num_readers: data parallel ranks times loader workers of the run.
    """
    dataset, layout = open_plan(plan)
    whole = Tally()
    for tally in tallies:
        tally.found["text_only"] = tally.counts["text only"]
        whole.counts.update(tally.counts)
        whole.lengths.update(tally.lengths)
        whole.pictures.update(tally.pictures)
        whole.see(tally.ids or ())
    findings = [_finding(name, dataset, tallies) for name in FINDINGS]
    samples = whole.counts["samples"]
    for finding in findings:
        if finding["name"] == "longer":
            finding["hurts"] = finding["count"] > max_longer * samples
        if finding["name"] == "too_few":
            finding["count"] = max(0, num_readers - _epoch(dataset))
    shares = _shares(dataset)
    lengths = draw([(tally.used, share) for tally, share in zip(tallies, shares, strict=True)])
    return {
        "dataset": plan.path,
        "split": plan.split,
        "conversation": plan.conversation,
        "seq_length": plan.seq_length,
        "num_samples": sum(map(len, dataset.sources)),
        "num_inspected": plan.num_samples,
        "pictures_decoded": plan.decode,
        "passed": not any(finding["count"] and finding["hurts"] for finding in findings),
        "findings": findings,
        "counts": {name: whole.counts[name] for name in COUNTS},
        "token_ids": {
            "lowest_and_highest": whole.ids,
            "tokenizer": layout.tokenizer.vocab_size,
            "model": plan.vocab_size,
        },
        "lengths": distribution(whole.lengths),
        "pictures": distribution(whole.pictures),
        "padding": padding(lengths, plan.seq_length),
        "sources": [
            _source(source.name, share, tally)
            for source, share, tally in zip(dataset.sources, shares, tallies, strict=True)
        ],
    }


COUNTS = (
    "samples",
    "excluded",
    "text only",
    "tokens",
    "tokens of pictures",
    "trained tokens",
    "tokens beyond the window",
)


def distribution(counts: Counter[int]) -> dict[str, Any]:
    """Mean, percentiles, and bins of round numbers, [first, last, count] each."""
    if not counts:
        return {"mean": None, "percentiles": {}, "bins": []}
    total, ordered = counts.total(), sorted(counts)
    lowest, highest = ordered[0], ordered[-1]
    width = _bin_width(highest - lowest + 1)
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value // width] += count
    return {
        "mean": sum(value * count for value, count in counts.items()) / total,
        "percentiles": {str(percent): _percentile(counts, ordered, percent) for percent in (0, 10, 50, 90, 99, 100)},
        "bins": [
            [number * width, number * width + width - 1, bins[number]]
            for number in range(lowest // width, highest // width + 1)
        ],
    }


def _bin_width(span: int) -> int:
    """1, 2 or 5 times a power of ten."""
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    return next(width for width in widths if width * (MAX_BINS - 1) >= span)


def _percentile(counts: Counter[int], ordered: Sequence[int], percent: int) -> int:
    """The least value that so many percent do not exceed."""
    wanted, seen = counts.total() * percent / 100, 0
    for value in ordered:
        seen += counts[value]
        if seen >= wanted:
            return value
    raise AssertionError(percent)


def _finding(name: str, dataset: Dataset, tallies: Sequence[Tally]) -> dict[str, Any]:
    kind = FINDINGS[name]
    named = list(zip(dataset.sources, tallies, strict=True))
    examples = [
        {"source": source.name, **example._asdict()}
        for source, tally in named
        for example in tally.examples.get(name, ())
    ]
    return {
        "name": name,
        "title": kind.title,
        "meaning": kind.meaning,
        "hurts": kind.hurts,
        "count": sum(tally.found[name] for tally in tallies),
        "of": sum(_number(tally, kind.unit) for tally in tallies),
        "unit": kind.unit,
        "by_source": {source.name: tally.found[name] for source, tally in named if tally.found[name]},
        "examples": examples[:MAX_EXAMPLES],
    }


def _number(tally: Tally, unit: str) -> int:
    """Samples or pictures in all."""
    return len(tally.files.values) if unit == "pictures" else tally.counts["samples"]


def _shares(dataset: Dataset) -> list[float]:
    """Of each source, its part of what a run draws."""
    if dataset.by_weight:
        sizes = [source.weight or 0.0 for source in dataset.sources]
    else:
        sizes = [len(source) * _times(source.repetitions) for source in dataset.sources]
    return [size / sum(sizes) for size in sizes]


def _epoch(dataset: Dataset) -> int:
    """Samples that readers share; of sources drawn by weight each is read by itself."""
    sizes = [int(len(source) * _times(source.repetitions)) for source in dataset.sources]
    return min(sizes) if dataset.by_weight else sum(sizes)


def _times(repetitions: float | None) -> float:
    return 1.0 if repetitions is None else repetitions


def _source(name: str, share: float, tally: Tally) -> dict[str, Any]:
    samples = tally.counts["samples"]
    hurt = {finding: count for finding, count in tally.found.items() if count}
    return {
        "name": name,
        "share_of_draws": share,
        "samples": samples,
        "usable": tally.used.total(),
        "text_only": tally.counts["text only"],
        "pictures": _number(tally, "pictures"),
        "tokens": tally.counts["tokens"],
        "trained_tokens": tally.counts["trained tokens"],
        "findings": dict(sorted(hurt.items())),
    }
