"""The next token of each request: the most probable one, or one drawn by the request's own random numbers.

Each row is judged by itself, so what a request gets does not depend on those beside it.

n requests, v tokens of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcore.inference.sampling import Sampling


def penalize(logits: Tensor, seen: Tensor, penalties: Tensor) -> Tensor:
    """Make tokens less probable that are there already.

    Args:
        logits: float32 [n, v].
        seen: bool [n, v].
        penalties: float32 [n].
    Source: Keskar et al., "CTRL", arXiv:1909.05858, section 4.1; that negative logits are multiplied, and that the
        prompt counts, is transformers' RepetitionPenaltyLogitsProcessor.
    """
    penalty = penalties[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def choose(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """Choose a token for each row; penalties are in the logits already.

    Args:
        logits: float32 [n, v].
        draws: of each row a number from 0 up to 1, which is not looked at where temperature is 0.
    Returns:
        int64 [n].
    """
    chosen = logits.argmax(dim=-1)  # [n]
    drawn = [index for index, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not drawn:
        return chosen
    rows = torch.tensor(drawn, device=logits.device)
    tokens, probabilities = distribution(logits[rows], [samplings[index] for index in drawn])
    shares = probabilities.double().cumsum(dim=-1)  # float64 [n, v]
    wanted = torch.tensor([draws[index] for index in drawn], device=logits.device, dtype=torch.float64)
    place = torch.searchsorted(shares, wanted[:, None] * shares[:, -1:], right=True)  # [n, 1]
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # the largest draw may round up to the whole
    chosen[rows] = tokens.gather(1, place.minimum(last))[:, 0]
    return chosen


def distribution(logits: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """What tokens are drawn from: temperature, then top-k, then top-p, as transformers orders them.

    Args:
        logits: float32 [n, v].
        samplings: of each row, none with temperature 0.
    Returns:
        Tokens int64 [n, v], the most probable first and of equals the lower id, and what each is drawn with, float32
        [n, v].
    """
    vocabulary = logits.shape[1]
    counts = [min(sampling.top_k or vocabulary, vocabulary) for sampling in samplings]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]

    logits = logits - logits.max(dim=-1, keepdim=True).values  # so that the coldest of temperatures leaves one finite
    scaled = logits / column([sampling.temperature for sampling in samplings])
    # Not by topk, which orders equals as the largest k of all rows has it, and in bf16 there are many.
    scaled, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=logits.device)
    scaled = scaled.masked_fill(rank >= column(counts), float("-inf"))
    probabilities = scaled.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of what is more probable
    before[:, 0] = 0.0  # the first stays, whatever top-p is
    # 1 is all, however the sum is rounded.
    limits = column([sampling.top_p if sampling.top_p < 1 else 2.0 for sampling in samplings])
    kept = probabilities.where(before < limits, 0.0)
    return tokens, kept / kept.sum(dim=-1, keepdim=True)
