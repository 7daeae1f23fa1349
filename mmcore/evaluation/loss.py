"""Perplexity of a validation set, of all its trained tokens and of each of its sources.

It is exp of the mean of minus the log-probability that the model gives to a token, over the tokens that training would
count: answers, their end tokens, the text of documents. Every sample of the split counts once, whatever a blend's
weights are, and by its tokens: so the number is that of the text, not of a run's batches.

`mmcore generate --task loss --data DATASET` writes the predictions, JSON lines of `id` (SOURCE/SHARD/SAMPLE), `source`,
`loss_sum` (nats) and `num_tokens` for each sample of the split, and for those that could not be used a `problem`, for
those that were cut to the model's length `was_cut`. References are the dataset: its folder, its .nv-meta/.info.json
(which is quicker to hash), or the YAML file that blends several, of which the numbers of samples are compared.

Perplexities of models with different tokenizers cannot be compared: their tokens are not the same.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmcore.evaluation.confidence import Statistic
from mmcore.evaluation.scores import EvaluationError, Group, Sample, Scores, write_whole
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options, read_json, sample_id
from mmcore.foreign import expand

if TYPE_CHECKING:
    import numpy as np

METRIC = "perplexity"
SCALES = {"perplexity": "1 or more, less is better", "loss": "nats a token, less is better"}
OPTIONS = {"split": ("val", "train", "test")}

META = Path(".nv-meta")
INFO, SPLIT = META / ".info.json", META / "split.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLoss:
    """What a model thinks of a sample."""

    id: str
    source: str
    loss_sum: float
    """Nats, over the trained tokens."""
    num_tokens: int
    """That are trained."""
    was_cut: bool = False
    """Whether it was longer than the model takes."""
    problem: str = ""
    """Why it could not be used; then the numbers are 0."""


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """There are none: nothing is asked.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "loss asks no questions: `mmcore generate --task loss` computes what `mmcore evaluate loss` scores, and while "
        "training --train.val-interval does it"
    )


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`. A sample's score is the mean log-probability of its tokens, of which more is better."""
    found = list(read_losses(predictions))
    losses = {row.id: row for row in found}
    if contradictory := [row.id for row in found if losses[row.id] != row]:
        raise EvaluationError(
            f"{predictions} has two different losses of {len(contradictory)} samples, the first is {contradictory[0]}"
        )
    notes = check_samples(predictions, losses.values(), references, options["split"])
    rows = [row for row in losses.values() if only is None or row.id in only]
    counted = [row for row in rows if row.num_tokens]
    if not counted:
        raise EvaluationError(f"{predictions}: no sample has a trained token, so there is no loss")
    counts = {
        "repeated": len(found) - len(losses),
        "skipped": sum(bool(row.problem) for row in rows),
        "cut": sum(row.was_cut for row in rows),
        "without trained tokens": sum(not row.num_tokens and not row.problem for row in rows),
    }
    table = [(row.loss_sum, float(row.num_tokens)) for row in counted]
    statistics = {"perplexity": Statistic(rows=table, value=_perplexity), "loss": Statistic(rows=table, value=_mean)}
    sources: dict[str, list[SampleLoss]] = {}
    for row in counted:
        sources.setdefault(row.source, []).append(row)
    return Scores(
        metric=METRIC,
        metrics={"perplexity": math.exp(mean_loss(counted)), "loss": mean_loss(counted)},
        scales=SCALES,
        statistics=statistics,
        samples=[
            Sample(
                id=row.id,
                score=-row.loss_sum / row.num_tokens,
                answer=f"{row.loss_sum:.4f} nats, {row.num_tokens} tokens",
                group=row.source,
            )
            for row in counted
        ],
        groups={
            "source": {
                name: Group(score=math.exp(mean_loss(part)), num_samples=len(part)) for name, part in sources.items()
            }
        },
        counts=counts,
        scorer={"split": options["split"], "tokens": str(sum(row.num_tokens for row in counted))},
        notes=(*notes, *_notes(counts, rows)),
    )


def mean_loss(rows: Sequence[SampleLoss]) -> float:
    """Nats a token."""
    return math.fsum(row.loss_sum for row in rows) / sum(row.num_tokens for row in rows)


def write_losses(path: Path, rows: Sequence[SampleLoss]) -> None:
    """Write the predictions, whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    optional = ("was_cut", "problem")
    contents = ({name: value for name, value in asdict(row).items() if value or name not in optional} for row in rows)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in contents).encode())


def read_losses(path: Path) -> Iterator[SampleLoss]:
    """Yield what `write_losses` wrote.

    Raises:
        ValueError: missing, unreadable, or in another format.
        EvaluationError: a loss is no number that a loss can be.
    """
    for where, row in read_rows(path, "predictions"):
        try:
            found = SampleLoss(
                id=sample_id(row["id"], where),
                source=str(row["source"]),
                loss_sum=float(row["loss_sum"]),
                num_tokens=int(row["num_tokens"]),
                was_cut=bool(row.get("was_cut")),
                problem=str(row.get("problem") or ""),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: a loss has id, source, loss_sum and num_tokens, as `mmcore generate --task loss` writes "
                f"them ({error!r})"
            ) from None
        if not math.isfinite(found.loss_sum) or found.loss_sum < 0 or found.num_tokens < 0:
            raise EvaluationError(
                f"{where}: the loss of {found.id} is {found.loss_sum} over {found.num_tokens} tokens, which is none: "
                "the model's weights or its number format are broken"
            )
        yield found


def check_samples(predictions: Path, rows: Iterable[SampleLoss], references: Path, split: str) -> list[str]:
    """See that every sample of the references is there, as far as their numbers tell.

    Returns:
        What could not be compared.
    Raises:
        ValueError: the references are no dataset.
        EvaluationError: there are more or fewer.
    """
    found = Counter(row.source for row in rows)
    expected = count_samples(references, split)
    if len(expected) == len(found) == 1:  # of one folder the name does not matter: it may have been moved
        expected = dict(zip(found, expected.values(), strict=True))
    wrong = [
        f"of {name} {found[name]} samples where the split has {expected.get(name, 0)}"
        for name in dict.fromkeys([*expected, *found])
        if expected.get(name, 0) not in (found[name], None)
    ]
    if wrong:
        raise EvaluationError(
            f"{predictions} is not the loss of {references}, split {split}: it has {'; '.join(wrong)}. A score would "
            "be meaningless, so none is written: compute the losses of this dataset"
        )
    unknown = ", ".join(name for name, count in expected.items() if count is None)
    return [f"of {unknown} a subset is taken: whether all its samples are there cannot be told"] if unknown else []


def count_samples(path: Path, split: str) -> dict[str, int | None]:
    """Samples of a split by source, named as `mmcore.data.dataset.open_dataset` names it.

    None where a YAML file takes a subset of a source: which samples these are its own reader knows.

    Raises:
        ValueError: no dataset, or it has no such split.
    """
    folder = path.parent.parent if path.name == INFO.name else path
    leaves = list(_leaves(folder, split, is_part=False))
    names = Counter(name for name, _ in leaves)
    return {name if names[name] == 1 else f"{name}_{number}": count for number, (name, count) in enumerate(leaves)}


def _leaves(path: Path, split: str, *, is_part: bool) -> Iterator[tuple[str, int | None]]:
    """Name and number of samples of every folder that a dataset is made of."""
    if path.is_dir():
        yield path.name, None if is_part else _count(path, split)
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = list(_parts(content["splits"][split]))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"the dataset {path} is no folder, and no YAML file with a split {split!r} that names some ({error!r})"
        ) from None
    for part in parts:
        is_cut = is_part or "subset" in content["splits"][split] or "subset" in part
        yield from _leaves(path.parent / part["path"], part.get("split_part") or split, is_part=is_cut)


def _parts(content: Any) -> Iterator[dict[str, Any]]:
    """What has a path, in a split of a metadataset: one, or some that are blended."""
    if "path" in content:
        yield content
        return
    for key in ("blend", "blend_epochized", "datasets"):
        yield from (item for item in content.get(key) or ())


def _count(folder: Path, split: str) -> int:
    info = read_json(folder / INFO, "the dataset's list of shards")
    try:
        content = yaml.safe_load((folder / SPLIT).read_text(encoding="utf-8"))
        excluded = {name for entry in content.get("exclude") or () for name in expand(entry)}
        shards = [name for entry in content["split_parts"][split] for name in expand(entry)]
        kept = [name for name in shards if name not in excluded]
        count = sum(int(info["shard_counts"][name]) for name in kept)
        return count - sum(name.rpartition("/")[0] in kept for name in excluded)
    except (OSError, yaml.YAMLError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"the dataset {folder} has no split {split!r} that can be read ({error!r})") from None


def _notes(counts: Mapping[str, int], rows: Sequence[SampleLoss]) -> Iterator[str]:
    if counts["skipped"]:
        first = next(row for row in rows if row.problem)
        yield (
            f"{counts['skipped']} of {len(rows)} samples could not be used and do not count, the first is {first.id}: "
            f"{first.problem}"
        )
    if counts["cut"]:
        yield f"{counts['cut']} of {len(rows)} samples were longer than the model takes, and were cut"
    if counts["without trained tokens"]:
        yield f"{counts['without trained tokens']} of {len(rows)} samples have no trained token: they do not count"


def _mean(sums: "np.ndarray") -> Any:
    return sums[..., 0] / sums[..., 1]


def _perplexity(sums: "np.ndarray") -> Any:
    import numpy as np

    return np.exp(_mean(sums))
