"""What is drawn from, against transformers' own processors; and draws that are exact, and each row's own."""

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmcore.inference.draw import choose, distribution, penalize
from mmcore.inference.sampling import Sampling

VOCABULARY = 60


def logits(rows: int) -> Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1))


def spread(tokens: Tensor, probabilities: Tensor) -> Tensor:
    """By token: [n, v]."""
    return torch.zeros(len(tokens), VOCABULARY).scatter(1, tokens, probabilities)


SAMPLINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.5, top_k=5),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=2.0, top_k=9, top_p=0.8),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=0.3, top_k=1000),
]


def test_the_distribution_is_that_of_transformers() -> None:
    scores = logits(len(SAMPLINGS))
    found = spread(*distribution(scores, SAMPLINGS))
    for row, sampling in enumerate(SAMPLINGS):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        expected = warpers(None, scores[row : row + 1]).softmax(-1)[0]
        torch.testing.assert_close(found[row], expected)
        assert (found[row] > 0).tolist() == (expected > 0).tolist()


def test_the_penalty_is_that_of_transformers() -> None:
    scores, ids = logits(3), torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(3, VOCABULARY, dtype=torch.bool).scatter(1, ids, True)
    penalties = torch.tensor([1.0, 1.3, 0.8])
    found = penalize(scores, seen, penalties)
    for row, penalty in enumerate(penalties.tolist()):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids[row : row + 1], scores[row : row + 1].clone())
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-6, atol=0)
    assert found[0].equal(scores[0]) and not found[1].equal(scores[1])


def test_every_number_draws_the_token_of_its_share() -> None:
    """Evenly spaced numbers draw each token as often as its probability says."""
    count, sampling = 4000, Sampling(temperature=1.0, top_k=6, top_p=0.9)
    scores = logits(1)
    draws = [(index + 0.5) / count for index in range(count)]
    drawn = choose(scores.expand(count, -1), [sampling] * count, draws)
    shares = drawn.bincount(minlength=VOCABULARY) / count
    torch.testing.assert_close(shares, spread(*distribution(scores, [sampling]))[0], rtol=0, atol=1.1 / count)


def test_the_ends_of_the_range() -> None:
    scores, sampling = logits(2), Sampling(temperature=1.0, top_p=0.5)
    tokens, probabilities = distribution(scores, [sampling, sampling])
    last = [int(row[(share > 0).sum() - 1]) for row, share in zip(tokens, probabilities, strict=True)]
    assert choose(scores, [sampling, sampling], [0.0, 1 - 2**-53]).tolist() == [int(tokens[0, 0]), last[1]]
    cold = Sampling(temperature=1e-3)
    assert choose(scores, [cold, cold], [0.0, 0.999]).equal(scores.argmax(-1))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Nor where many tokens are equal, as in bf16."""
    scores, draws = logits(8).round(), [0.1, 0.9, 0.4, 0.6, 0.2, 0.8, 0.3, 0.99]
    samplings = [Sampling(), *SAMPLINGS]
    together = choose(scores, samplings, draws)
    for row in range(8):
        assert choose(scores[row : row + 1], samplings[row : row + 1], draws[row : row + 1]) == together[row]
    assert together[0] == scores[0].argmax()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_what_makes_no_sense(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        Sampling(**{option: value})
