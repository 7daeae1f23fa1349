"""What a text shares with one reference: BLEU and its precisions, ROUGE-1, 2, L and Lsum, as Hugging Face has them.

BLEU: huggingface/evaluate metrics/bleu at commit 4ec931e, which cuts texts as mteval-v13a.pl does and counts as
tensorflow/nmt nmt/scripts/bleu.py at 263d6dc, without smoothing. ROUGE: google-research/google-research rouge/ at
commit 61ce9f0 (the package rouge-score), F-measures without stemming. Neither package is needed.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MAX_ORDER = 4
ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# mteval-v13a.pl's rules in their order: symbols, full stops and commas but within numbers, dashes after digits.
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_RULES = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_NO_WORD = re.compile(r"[^a-z0-9]+")


def tokenize_13a(text: str) -> list[str]:
    """Tokens as BLEU counts them; case is kept."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES.items():  # in this order: &amp;lt; ends as <
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.split()


def bleu(candidate: str, reference: str) -> tuple[float, list[float]]:
    """BLEU of one text, and its precisions of 1- to 4-grams; 0 of n-grams that are longer than the text."""
    tokens, truth = tokenize_13a(candidate), tokenize_13a(reference)
    if not tokens or not truth:
        return 0.0, [0.0] * MAX_ORDER
    precisions = []
    for order in range(1, MAX_ORDER + 1):
        found = _ngrams(tokens, order)
        precisions.append((found & _ngrams(truth, order)).total() / found.total() if found else 0.0)
    if min(precisions) == 0:
        return 0.0, precisions
    mean = math.exp(sum(math.log(one) for one in precisions) / MAX_ORDER)
    return mean * min(1.0, math.exp(1 - len(truth) / len(tokens))), precisions


def rouge(candidate: str, reference: str) -> dict[str, float]:
    """F-measures, of Lsum with a sentence on each line."""
    tokens, truth = _words(candidate), _words(reference)
    found = {}
    for order, name in enumerate(ROUGES[:2], 1):
        ours, theirs = _ngrams(tokens, order), _ngrams(truth, order)
        found[name] = _f_measure((ours & theirs).total(), ours.total(), theirs.total())
    common = int(_common(truth, tokens)[-1, -1])
    found["rougeL"] = _f_measure(common, len(tokens), len(truth))
    lines = [[_words(line) for line in text.split("\n") if line] for text in (candidate, reference)]
    found["rougeLsum"] = _f_measure(_union(*lines), *(sum(map(len, text)) for text in lines))
    return found


def _words(text: str) -> list[str]:
    """Tokens as ROUGE counts them: letters and digits of ASCII, in lower case."""
    return _NO_WORD.sub(" ", text.lower()).split()


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def _f_measure(common: int, ours: int, theirs: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / ours, common / theirs
    return 2 * precision * recall / (precision + recall)


def _common(truth: Sequence[str], tokens: Sequence[str]) -> "np.ndarray":
    """Length of the longest common subsequence of every two beginnings: int64 [truth + 1, tokens + 1]."""
    import numpy as np

    numbers = {token: number for number, token in enumerate(dict.fromkeys([*truth, *tokens]))}
    ours = np.array([numbers[token] for token in tokens], dtype=np.int64)
    table = np.zeros((len(truth) + 1, len(tokens) + 1), dtype=np.int64)
    for row, token in enumerate(truth):
        longest = np.maximum(table[row, 1:], table[row, :-1] + (ours == numbers[token]))
        np.maximum.accumulate(longest, out=table[row + 1, 1:])
    return table


def _union(lines: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> int:
    """Words of the reference's sentences that are common with any of the text's, none counted more often than there.

    Of several longest common subsequences the one that rouge-score walks to counts.
    """
    left = Counter(word for line in lines for word in line)
    common = 0
    for sentence in truth:
        for word in (sentence[place] for place in sorted({place for line in lines for place in _walk(sentence, line)})):
            if left[word] > 0:
                left[word] -= 1
                common += 1
    return common


def _walk(truth: Sequence[str], tokens: Sequence[str]) -> list[int]:
    """Places in the reference of one longest common subsequence."""
    table, places = _common(truth, tokens), []
    row, column = len(truth), len(tokens)
    while row and column:
        if truth[row - 1] == tokens[column - 1]:
            row, column = row - 1, column - 1
            places.append(row)
        elif table[row, column - 1] > table[row - 1, column]:
            column -= 1
        else:
            row -= 1
    return places
