"""BLEU and METEOR as functions of sums over captions, so that their intervals of chance can be drawn.

Both are made of counts that their official scorers add up over all captions before they compute one number: BLEU of
n-grams and lengths (pycocoevalcap 1.2, bleu/bleu_scorer.py), METEOR of the 23 numbers that its jar gives for each
caption (cmu-mtlab/meteor, MeteorStats.java and MeteorScorer.java at commit 3f42664). The formulas here give the
official numbers of any set of captions to the last digits.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mmcore.evaluation.confidence import Statistic

if TYPE_CHECKING:
    import numpy as np

# METEOR 1.5's parameters of English ("rank"), Constants.java: alpha weighs recall, beta and gamma the penalty for
# scattered matches, delta content words; then the weights of exact, stem, synonym and paraphrase matches.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
STAGES = (1.0, 0.6, 0.8, 0.6)


def bleu(counts: Sequence[Mapping[str, Any]]) -> dict[str, Statistic]:
    """Of Bleu_1 to Bleu_4.

    Args:
        counts: of each caption, as `BleuScorer.ctest` holds them.
    """
    rows = [
        (
            row["testlen"],
            # Of the reference that is closest in length, of two the shorter: pycocoevalcap's "closest".
            min((abs(length - row["testlen"]), length) for length in row["reflen"])[1],
            *row["guess"],
            *row["correct"],
        )
        for row in counts
    ]
    return {f"Bleu_{n}": Statistic(rows=rows, value=partial(_bleu, n)) for n in range(1, 5)}


def _bleu(n: int, sums: "np.ndarray") -> "np.ndarray":
    """[..., 10] -> [...]; the small numbers are pycocoevalcap's."""
    import numpy as np

    length, reference = sums[..., 0] + 1e-15, sums[..., 1] + 1e-9
    precisions = (sums[..., 6 : 6 + n] + 1e-15) / (sums[..., 2 : 2 + n] + 1e-9)  # [..., n]
    return precisions.prod(-1) ** (1 / n) * np.exp(np.minimum(0, 1 - reference / length))


def meteor(lines: Sequence[str]) -> Statistic:
    """Of METEOR.

    Args:
        lines: what the jar answers to SCORE, one for each caption.
    """
    rows = [[float(number) for number in line.split()] for line in lines]
    for row in rows:
        test, reference, chunks = row[0], row[1], row[20]
        # A caption that is the reference word by word has no part in the penalty.
        if (sum(row[4:20:2]), sum(row[5:20:2]), chunks) == (test, reference, 1):
            row[20] = 0.0
    return Statistic(rows=rows, value=_meteor)


def _meteor(sums: "np.ndarray") -> "np.ndarray":
    """[..., 23] -> [...].

    The numbers: words of caption and reference, function words of both, for each stage content matches of both and
    function word matches of both, chunks, words matched of both.
    """
    import numpy as np

    stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    content, function = np.split(np.asarray(STAGES) @ stages, 2, axis=-1)  # [..., 2] each
    words, function_words = sums[..., 0:2], sums[..., 2:4]
    with np.errstate(divide="ignore", invalid="ignore"):
        matched = DELTA * content + (1 - DELTA) * function
        precision, recall = np.moveaxis(
            matched / (DELTA * (words - function_words) + (1 - DELTA) * function_words), -1, 0
        )
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        penalty = GAMMA * (sums[..., 20] / (sums[..., 21:23].sum(-1) / 2)) ** BETA
        return np.nan_to_num(np.maximum(mean * (1 - penalty), 0), nan=0.0)
