"""The choice of the lowest mean loss, packed and at any layout, against one forward pass for each choice."""

from typing import Any

import pytest
import torch

from mmcore.config import ParallelConfig
from mmcore.inference import option_loss
from mmcore.inference.engine import Prompt
from mmcore.inference.generator import answering
from mmcore.inference.option_loss import Question, choose_options
from mmcore.models.architecture import Architecture
from tests import ranks, tiny
from tests.inference.test_generator import LAYOUTS, prompts, tiled_prompts
from tests.models.test_pictures import ANYRES


def questions(arch: Architecture | None) -> list[Question]:
    """Choices of one to four tokens."""
    random, found = torch.Generator().manual_seed(3), []
    for prompt in tiled_prompts() if arch else prompts():
        sizes = torch.randint(1, 5, (4,), generator=random).tolist()
        choices = tuple(torch.randint(0, 150, (size,), generator=random).tolist() for size in sizes)
        found.append(Question(prompt=prompt, choices=choices))
    return found


def mean_loss(model: Any, prompt: Prompt, choice: list[int]) -> float:
    tokens = [*prompt.tokens, *choice]
    logits = model(torch.tensor([tokens]), prompt.images, image_sources=prompt.image_sources)  # [s, v]
    log = logits.log_softmax(-1)
    places = range(len(prompt.tokens), len(tokens))
    return -sum(float(log[place - 1, tokens[place]]) for place in places) / len(choice)


@torch.no_grad()
def plain(arch: Architecture | None) -> tuple[list[int], list[float]]:
    model = tiny.build(ParallelConfig(), arch=arch).eval()
    losses = [[mean_loss(model, asked.prompt, choice) for choice in asked.choices] for asked in questions(arch)]
    return [row.index(min(row)) for row in losses], [loss for row in losses for loss in row]


def ours(layout: ParallelConfig, arch: Architecture | None) -> list[tuple[list[int], list[float]]]:
    """One question in a pass, a few, and all."""
    model = tiny.build(layout, arch=arch)
    return [answered(model, arch, max_tokens) for max_tokens in (1, 150, 10_000)]


def answered(model: Any, arch: Architecture | None, max_tokens: int) -> tuple[list[int], list[float]]:
    chosen: list[int] = []
    losses: list[float] = []
    compute = option_loss._losses

    def recorded(model: Any, row: Any) -> torch.Tensor:
        found = compute(model, row)
        sizes = [len(choice) for question in questions(arch) for choice in question.choices][len(losses) :]
        rest = found
        while len(rest):
            part, rest = rest[: sizes[0]], rest[sizes.pop(0) :]
            losses.append(float(part.mean()))
        return found

    option_loss._losses = recorded  # type: ignore
    with answering(model):
        choose_options(model, questions(arch), max_tokens=max_tokens, on_chosen=chosen.append)
    option_loss._losses = compute
    return chosen, losses


@pytest.mark.parametrize("arch", [None, ANYRES], ids=["squares", "tiles"])
@pytest.mark.parametrize("name", ["tp1", "tp2", "pp2", "tp2pp2"])
def test_the_least_surprising_choice(name: str, arch: Architecture | None) -> None:
    layout, world_size = LAYOUTS[name]
    chosen, losses = ranks.run(plain, ParallelConfig(), 1, arch)[0]
    assert len(set(chosen)) > 1, "all choices are alike: the test would see nothing"
    for rank, results in enumerate(ranks.run(ours, layout, world_size, layout, arch)):
        for answers, found in results:
            assert found == pytest.approx(losses, rel=1e-4)  # every rank knows the losses
            assert answers == ([] if rank else chosen)


def test_of_equal_choices_the_first() -> None:
    def chosen() -> list[int]:
        model, found = tiny.build(ParallelConfig()).eval(), []
        asked = [Question(prompt=prompts()[0], choices=([4, 5], [7], [4, 5], [7]))]
        choose_options(model, asked, max_tokens=1000, on_chosen=found.append)
        return found

    assert ranks.run(chosen, ParallelConfig(), 1)[0][0] in (0, 1)
