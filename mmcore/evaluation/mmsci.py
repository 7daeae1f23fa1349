"""MMSci: captions of figures of scientific articles, and which caption belongs to which figure.

The file tells the two apart: image_caption_generation_data.json is a list of figures with their captions, and
image_caption_matching_data.json lists of questions in three settings (see `mmcore.evaluation.mmsci_matching`). Those of
the dev split have answers; of the test split the files with answers (..._w_answer.json) are MMSci's own.

Captions are scored as Leezekun/MMSci does it at commit c787815 (mmsci-exps/eval/textgen_scores.py): each by itself,
then the mean over those that are not empty. Its BLEU-1 to 4 are the precisions of 1- to 4-grams of Hugging Face's
`bleu`, not BLEU up to that order; its ROUGE is the F-measure. Both are rebuilt from their definition, in
`mmcore.evaluation.metrics.overlap`. Two things differ: METEOR is officially NLTK's, which needs WordNet's data, and
here METEOR 1.5's Java program, caption by caption all the same, whose numbers are of another size; BERTScore needs a
model and is left out. CIDEr is none of MMSci's: it is pycocoevalcap's, with words weighed as in these captions.

Where there are several answers for each figure (`prediction` of the official output, k of them) a metric is the mean
of its k runs, as in the official notebook.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmcore.evaluation import mmsci_matching
from mmcore.evaluation.confidence import Statistic
from mmcore.evaluation.metrics.captions import CaptionScores, Tokenizer, score_captions
from mmcore.evaluation.metrics.overlap import MAX_ORDER, ROUGES, bleu, rouge
from mmcore.evaluation.predictions import Predictions, load_predictions, match_answers
from mmcore.evaluation.scores import EvaluationError, Group, Sample, Scores
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options, find_images, read_json

if TYPE_CHECKING:
    import numpy as np

METRIC = "rougeL"  # of captions; of questions it is accuracy
CAPTIONING = {
    **{f"BLEU-{order}": "0 to 1" for order in range(1, MAX_ORDER + 1)},
    "BLEU": "0 to 1",
    **dict.fromkeys(ROUGES, "0 to 1"),
    "METEOR": "0 to 1",
    "CIDEr": "0 to 10",
}
SCALES = {**CAPTIONING, **mmsci_matching.SCALES}
OPTIONS = {
    # What of the article the prompt for a caption has.
    "grounding": ("none", "abstract", "article"),
    # How captions are cut into words for METEOR and CIDEr: see `mmcore.evaluation.coco`.
    "tokenizer": ("auto", "ptb", "python", "none"),
    # Empty captions have officially no part in the mean.
    "empty": ("left-out", "zero"),
    **mmsci_matching.OPTIONS,
}

# mmsci-exps/run_captioning.py, format_prompt; the two differ by a letter.
UNGROUNDED = "Please write a detailed description of the whole figures and all sub-figures based on the article."
GROUNDED = "Please write a detailed description of the whole figure and all sub-figures based on the article.\n"
# The official prompt has 1024 tokens of cl100k_base, instruction included. That vocabulary is a download: four
# characters stand for a token, so that an article may end some words earlier or later. Abstracts are shorter.
MAX_CHARACTERS = 4 * 1024 - len(GROUNDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure to describe."""

    id: str
    """Its file name up to the first full stop, as officially."""
    image: str
    caption: str
    """Empty where it is not public."""
    abstract: str
    content: str
    subject: str
    category: str


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`."""
    content = read_json(data, "MMSci's data")
    if mmsci_matching.is_matching(content):
        return mmsci_matching.examples(content, data, images, options)
    figures = load_figures(content, data)
    paths = find_images(data, images, [figure.image for figure in figures])
    return [
        Example(
            id=figure.id,
            prompt=caption_prompt(figure, options["grounding"]),
            images=path,
            references=(figure.caption,) if figure.caption else (),
        )
        for figure, path in zip(figures, paths, strict=True)
    ]


def caption_prompt(figure: Figure, grounding: str) -> str:
    """The official prompt, ungrounded, or with the abstract or the article."""
    if grounding == "none":
        return UNGROUNDED
    article = f"Article:\n{figure.abstract if grounding == 'abstract' else figure.content}"[:MAX_CHARACTERS]
    prompt = f"{GROUNDED} {article}"
    if not prompt.endswith((".", "!", "?")):
        prompt += " ...\n"
    return f"{prompt}\n{GROUNDED}" if grounding == "article" else prompt


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; numbers of captions are from 0 to 1 (CIDEr: 10), accuracies percentages."""
    content = read_json(references, "MMSci's data")
    if mmsci_matching.is_matching(content):
        return mmsci_matching.score(content, predictions, references, options, only)
    figures = [figure for figure in load_figures(content, references) if only is None or figure.id in only]
    bare = [figure.id for figure in figures if not figure.caption]
    if bare:
        raise ValueError(
            f"{references}: {len(bare)} of {len(figures)} figures have no caption to compare with, first {bare[0]}: "
            "those of the test split are in image_caption_generation_data_w_answer.json, which MMSci keeps"
        )
    runs = _load_runs(predictions, [figure.id for figure in figures], references)
    counted = [
        {name: text for name, text in run.answers.items() if text.strip() or options["empty"] == "zero"} for run in runs
    ]
    if not all(counted):
        raise EvaluationError(f"{predictions}: all captions are empty, so there is no score")
    captions = {figure.id: figure.caption for figure in figures}
    scored = [_score_run(answers, captions, options["tokenizer"]) for answers in counted]
    statistics = {
        metric: Statistic(rows=_rows([values[metric] for values, _ in scored], captions), value=_mean_of_runs)
        for metric in CAPTIONING
        if all(metric in values for values, _ in scored)
    }
    metrics = {metric: _total(statistic.rows) for metric, statistic in statistics.items()}
    rows = dict(zip(captions, statistics[METRIC].rows, strict=True))
    details = scored[0][1]
    # What is general there about empty answers is not so here.
    notes = [note for run in runs for note in run.notes if "answers are empty" not in note] + [*details.notes]
    if "METEOR" in metrics:
        notes.append("METEOR is METEOR 1.5's, caption by caption; MMSci's own is NLTK's, whose numbers differ")
    counts = {name: sum(run.counts[name] for run in runs) for name in runs[0].counts}
    if counts["empty"]:
        how = "count as 0" if options["empty"] == "zero" else "have no part in the means, as officially"
        notes.append(f"{counts['empty']} empty captions {how}")
    return Scores(
        metric=METRIC,
        metrics=metrics,
        scales={name: SCALES[name] for name in metrics},
        statistics=statistics,
        samples=[
            Sample(
                id=figure.id,
                score=sum(rows[figure.id][0::2]) / max(sum(rows[figure.id][1::2]), 1.0),
                answer=runs[0].answers[figure.id],
                references=(figure.caption,),
                group=figure.subject,
            )
            for figure in figures
        ],
        num_samples=len(set().union(*counted)),
        groups=_groups(figures, rows),
        counts=counts,
        skipped=details.skipped,
        scorer={**details.scorer, "rule": "Leezekun/MMSci textgen_scores.py at c787815", "runs": str(len(runs))},
        notes=tuple(notes),
    )


def load_figures(content: Any, path: Path) -> list[Figure]:
    """All figures of a file, in its order.

    Raises:
        ValueError: not MMSci's, or a figure twice.
    """
    try:
        figures = [
            Figure(
                id=_name(row["image"]),
                image=row["image"],
                caption=row["caption"] or "",
                **{key: row.get(key) or "" for key in ("abstract", "content", "subject", "category")},
            )
            for row in content
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is neither MMSci's list of figures (image, caption, abstract, content, subject, category) nor its "
            f"lists of questions: {error!r}"
        ) from None
    if not figures or len({figure.id for figure in figures}) < len(figures):
        raise ValueError(f"{path} has {'a figure twice' if figures else 'no figures'}")
    return figures


def _name(image: str) -> str:
    return image.split(".")[0]


def _load_runs(path: Path, ids: Sequence[str], references: Path) -> list[Predictions]:
    """Captions in our format, or all k of the official output: a list of figures with `prediction`."""
    rows = [row for _, row in read_rows(path, "predictions")]
    if not rows or not all(isinstance(row, dict) and "image" in row for row in rows):
        return [load_predictions(path, ids, references)]
    answers = {
        _name(row["image"]): [row["prediction"]] if isinstance(row["prediction"], str) else row["prediction"]
        for row in rows
        if row.get("prediction")
    }
    lengths = {len(texts) for texts in answers.values()}
    if len(lengths) > 1:
        raise ValueError(f"{path} has {min(lengths)} captions for some figures and {max(lengths)} for others")
    return [
        match_answers(path, {name: texts[run] for name, texts in answers.items()}, ids, references)
        for run in range(max(lengths, default=1))
    ]


def _score_run(
    answers: Mapping[str, str], captions: Mapping[str, str], tokenizer: str
) -> tuple[dict[str, dict[str, float]], CaptionScores]:
    """Every metric of every caption, and what pycocoevalcap says of all together."""
    import numpy as np

    values: dict[str, dict[str, float]] = {metric: {} for metric in CAPTIONING if metric != "METEOR"}
    for name, answer in answers.items():
        values["BLEU"][name], precisions = bleu(answer, captions[name])
        for order, precision in enumerate(precisions, 1):
            values[f"BLEU-{order}"][name] = precision
        for metric, value in rouge(answer, captions[name]).items():
            values[metric][name] = value
    details = score_captions(answers, {name: [captions[name]] for name in answers}, cast(Tokenizer, tokenizer))
    values["CIDEr"] = details.cider
    if "METEOR" in details.statistics:
        meteor = details.statistics["METEOR"]
        values["METEOR"] = dict(zip(answers, map(float, meteor.value(np.asarray(meteor.rows))), strict=True))
    return values, details


def _rows(runs: Sequence[Mapping[str, float]], names: Iterable[str]) -> list[list[float]]:
    """Of every figure, and in it of every run: the value, and whether it counts."""
    return [
        [number for values in runs for number in ((values[name], 1.0) if name in values else (0.0, 0.0))]
        for name in names
    ]


def _mean_of_runs(sums: "np.ndarray") -> Any:
    return (sums[..., 0::2] / sums[..., 1::2]).mean(-1)


def _total(rows: Any) -> float:
    import numpy as np

    return float(_mean_of_runs(np.asarray(rows).sum(0)))


def _groups(figures: Sequence[Figure], rows: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Group]]:
    """Of subjects and categories that have captions that count in every run."""
    groups: dict[str, dict[str, Group]] = {}
    for kind in ("subject", "category"):
        members: dict[str, list[Sequence[float]]] = {}
        for figure in figures:
            if (name := getattr(figure, kind)) and any(rows[figure.id][1::2]):
                members.setdefault(name, []).append(rows[figure.id])
        found = {
            name: Group(score=_total(part), num_samples=len(part))
            for name, part in sorted(members.items())
            if all(map(any, zip(*(row[1::2] for row in part), strict=True)))
        }
        if found:
            groups[kind] = found
    return groups
