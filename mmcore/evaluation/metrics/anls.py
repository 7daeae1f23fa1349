"""ANLS, average normalised Levenshtein similarity: how many characters of an answer are right, if at least half are.

Source: infographicsvqa_eval.py of the RRC server, as QwenLM/Qwen-VL has it in eval_mm at commit aa00ed0. Case does not
count, nor does how words are spaced; but the distance is divided by the length of the longer text **as it was given**,
with all its spaces. A similarity of exactly one half counts (by the formula of the paper, arXiv 1905.13648, it is 0).
"""

from collections.abc import Sequence

THRESHOLD = 0.5


def anls(answer: str, references: Sequence[str]) -> float:
    """Similarity to the nearest of the references, one at least: 0, or from .5 to 1."""
    value = 1 - min(_distance(answer, reference) for reference in references)
    return value if value >= THRESHOLD else 0.0


def _distance(answer: str, reference: str) -> float:
    # Upper case may be longer: "\u00df" becomes "SS".
    length = max(len(answer.upper()), len(reference.upper()))
    if not length:
        return 0.0
    return levenshtein(" ".join(answer.lower().split()), " ".join(reference.lower().split())) / length


def levenshtein(first: str, second: str) -> int:
    """How many characters have to be inserted, deleted or replaced."""
    row = list(range(len(first) + 1))
    for number, other in enumerate(second, 1):
        diagonal, row[0] = row[0], number
        for index, own in enumerate(first, 1):
            diagonal, row[index] = row[index], min(row[index] + 1, row[index - 1] + 1, diagonal + (own != other))
    return row[-1]
