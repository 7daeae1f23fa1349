"""OK-VQA: questions about COCO's pictures that take knowledge from outside of them; VQA's rule and VQA's files.

Its own files are mscoco_val2014_annotations.json and OpenEnded_mscoco_val2014_questions.json, read as VQAv2's (see
`mmcore.evaluation.vqav2`), and Hugging Face's table (lmms-lab/OK-VQA). Of every person's answer `answer` counts, which
is the official one, not `raw_answer`. Some authors stem or lemmatise predictions first; that is not done here.
"""

from collections.abc import Collection
from pathlib import Path

from mmcore.evaluation import vqav2
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.task import Example, Options

METRIC = vqav2.METRIC
SCALES = vqav2.SCALES
OPTIONS = vqav2.OPTIONS


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`."""
    return vqav2.examples(data, images, options=options)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; the score is a percentage."""
    return vqav2.score(predictions, references, options=options, only=only)
