"""Cached, batched, sharded generation against the plain definition: argmax, append, repeat."""

import pytest
import torch

from mmcore.config import ParallelConfig
from mmcore.inference.generator import Prompt, generate
from tests import ranks, tiny
from tests.models.test_pictures import ANYRES, anyres_sample

LAYOUTS = {
    "tp1": (ParallelConfig(), 1),
    "tp2": (ParallelConfig(tensor_model_parallel_size=2), 2),
    "pp2": (ParallelConfig(pipeline_model_parallel_size=2), 2),
    "tp2pp2": (ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 4),
    "dp2": (ParallelConfig(), 2),
    "cp2": (ParallelConfig(context_parallel_size=2), 2),
}
NEW = 6


def prompts() -> list[Prompt]:
    """Ragged: several lengths, with no, one and two pictures."""
    found = []
    for seed, images in enumerate((1, 1, 2, 0, 1, 2, 0)):
        sample = tiny.sample(seed, images)
        found.append(Prompt(tokens=sample.tokens.tolist(), images=sample.images))
    return found


@torch.no_grad()
def plain() -> list[list[int]]:
    """Every token by a forward pass over everything before it: no cache, no batch."""
    model = tiny.build(ParallelConfig()).eval()
    answers = []
    for prompt in prompts():
        tokens = list(prompt.tokens)
        for _ in range(NEW):
            logits = model(torch.tensor([tokens]), prompt.images)
            tokens.append(int(logits[-1].argmax()))
        answers.append(tokens[len(prompt.tokens) :])
    return answers


def ours(layout: ParallelConfig, end_id: int, batch_size: int) -> tuple[list[list[int]], int]:
    told: list[int] = []
    answers = generate(
        tiny.build(layout),
        prompts(),
        end_ids=(end_id,),
        max_new_tokens=NEW,
        batch_size=batch_size,
        on_progress=told.append,
    )
    return answers, sum(told)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    answers = ranks.run(plain, ParallelConfig(), 1)[0]
    assert len({tuple(answer) for answer in answers}) > 3, "all answers are alike: the test would see nothing"
    return answers


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_plain_answer(name: str, expected: list[list[int]]) -> None:
    layout, world_size = LAYOUTS[name]
    results = ranks.run(ours, layout, world_size, layout, -1, 8)
    assert all(answers == expected for answers, _ in results)
    told = sorted(told for _, told in results)  # on the main rank of each replica
    assert told == ([3, 4] if name == "dp2" else [0] * (world_size - 1) + [7])


def test_an_answer_ends_at_its_end_token_and_does_not_depend_on_its_batch(expected: list[list[int]]) -> None:
    end_id = expected[0][2]
    cut = [answer[: answer.index(end_id)] if end_id in answer else answer for answer in expected]
    for batch_size in (1, 8):
        answers, _ = ranks.run(ours, ParallelConfig(), 1, ParallelConfig(), end_id, batch_size)[0]
        assert answers == cut


def tiled_prompts() -> list[Prompt]:
    """Of one length, so that they are batched, each with other pixels."""
    samples = [anyres_sample(seed, (30, 17)) for seed in range(3)]
    tokens = samples[0].tokens.tolist()
    return [
        Prompt(tokens=tokens, images=sample.images.flip(-1), image_sources=sample.image_sources) for sample in samples
    ]


@torch.no_grad()
def plain_and_batched_tiles() -> tuple[list[list[int]], list[list[int]]]:
    model = tiny.build(ParallelConfig(), arch=ANYRES).eval()
    plain = []
    for prompt in tiled_prompts():
        tokens = list(prompt.tokens)
        for _ in range(NEW):
            logits = model(torch.tensor([tokens]), prompt.images, image_sources=prompt.image_sources)
            tokens.append(int(logits[-1].argmax()))
        plain.append(tokens[len(prompt.tokens) :])
    return plain, generate(model, tiled_prompts(), max_new_tokens=NEW, batch_size=8)


def test_pictures_in_tiles() -> None:
    """Sources of a batch count on from picture to picture."""
    plain, batched = ranks.run(plain_and_batched_tiles, ParallelConfig(), 1)[0]
    assert len({tuple(answer) for answer in plain}) > 1, "all answers are alike: the test would see nothing"
    assert batched == plain
