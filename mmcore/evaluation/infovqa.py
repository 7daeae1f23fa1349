"""InfographicVQA: questions about infographics, scored by ANLS.

Read are infographicsVQA_val_v1.0.json and its form with kinds of answers, evidence and reasoning, Hugging Face's table
(lmms-lab/DocVQA, InfographicVQA) and VLMEvalKit's. The rule and the server's format are those of
`mmcore.evaluation.docvqa`.
"""

from collections.abc import Collection
from pathlib import Path

from mmcore.evaluation import docvqa
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.short_answers import Kinds, ask
from mmcore.evaluation.task import Example, Options

METRIC = docvqa.METRIC
SCALES = docvqa.SCALES
OPTIONS = docvqa.OPTIONS

KINDS: Kinds = {
    "answer type": lambda row: row.get("answer_type"),
    "evidence": lambda row: row.get("evidence"),
    "reasoning": lambda row: row.get("operation/reasoning"),
}


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; answers need not be there."""
    return ask(data, images, docvqa.load(data, KINDS), names=docvqa.names)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`."""
    return docvqa.score_anls(predictions, references, KINDS, only)


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """For the RRC server (rrc.cvc.uab.es): [{"questionId", "answer"}]."""
    docvqa.submission(predictions, references, output, options)
