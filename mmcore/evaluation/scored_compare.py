"""Two runs of one task, sample by sample: how far they are apart, whether that is chance, and whether they compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isclose

from mmcore.evaluation.confidence import interval, mean, paired_p_value
from mmcore.evaluation.scored_run import ScoredRun

MAX_PAIRS = 10  # of more, each run is compared with the first alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of the means of the samples' scores, on the samples that both runs have."""

    first: str
    second: str
    value: float
    """The second's mean less the first's, on the scale of the task's metric."""
    interval: tuple[float, float] | None
    """95 of 100 draws of as many samples lie in it; None of a single sample."""
    p_value: float
    """Of the paired permutation test; see `mmcore.evaluation.confidence.paired_p_value`."""
    num_better: int
    """Samples on which the second is better."""
    num_worse: int
    num_same: int
    is_of_metric: bool
    """Whether the metric is that mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Runs of one task, one or more."""

    runs: Sequence[ScoredRun]
    differences: Sequence[Difference]
    """Of every two runs, or of each and the first where that were too many; of those that have samples in common."""
    contrasts: Sequence[str]
    """What makes the runs hard to compare, in words."""
    problem: str
    """Why there are no pictures, or ""."""


def compare(runs: Sequence[ScoredRun], problem: str = "") -> Comparison:
    """Test the differences of runs of one task.

    Args:
        problem: why there are no pictures.
    """
    return Comparison(runs=runs, differences=_differences(runs), contrasts=_contrasts(runs), problem=problem)


def _differences(runs: Sequence[ScoredRun]) -> list[Difference]:
    pairs = [*combinations(runs, 2)]
    if len(pairs) > MAX_PAIRS:
        pairs = [(runs[0], run) for run in runs[1:]]
    return [found for first, second in pairs if (found := _difference(first, second))]


def _difference(first: ScoredRun, second: ScoredRun) -> Difference | None:
    ids = [name for name in first.samples if name in second.samples]
    if not ids:
        return None
    scores = [[run.samples[name].score for name in ids] for run in (first, second)]
    gains = [after - before for before, after in zip(*scores, strict=True)]
    factor = 100.0 if first.content["scales"][first.content["metric"]].startswith("percent") else 1.0
    means = [factor * sum(values) / len(values) for values in scores]
    return Difference(
        first=first.name,
        second=second.name,
        value=factor * sum(gains) / len(gains),
        interval=interval(mean(gains, factor)) if len(gains) > 1 else None,
        p_value=paired_p_value(*scores),
        num_better=sum(gain > 0 for gain in gains),
        num_worse=sum(gain < 0 for gain in gains),
        num_same=sum(gain == 0 for gain in gains),
        is_of_metric=all(
            isclose(mean_, run.content["score"], rel_tol=1e-6, abs_tol=1e-9)
            for mean_, run in zip(means, (first, second), strict=True)
        ),
    )


def _contrasts(runs: Sequence[ScoredRun]) -> list[str]:
    found = []
    if len({_references(run) for run in runs}) > 1:
        found.append("The runs were scored against different files of references.")
    keys = dict.fromkeys(key for run in runs for key in run.content.get("scorer", {}))
    for key in keys:
        told = [str(run.content.get("scorer", {}).get(key, "-")) for run in runs]
        if len(set(told)) > 1:
            found.append(
                f"The scorer differs in {key}: "
                + ", ".join(f"{run.name} {value}" for run, value in zip(runs, told, strict=True))
                + "."
            )
    sizes = {run.content.get("num_samples") for run in runs}
    if len(sizes) > 1:
        found.append("The runs are over different numbers of samples.")
    bare = [run.name for run in runs if not run.samples]
    if bare:
        found.append(f"Of {', '.join(bare)} no samples were kept: there is no test, and nothing of it in the gallery.")
    return found


def _references(run: ScoredRun) -> str:
    return str(run.content.get("inputs", {}).get("references", {}).get("sha256", ""))
