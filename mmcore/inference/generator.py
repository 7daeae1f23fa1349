"""Answers to a list of prompts from the live model, at any layout: see `mmcore.inference.engine`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from mmcore import distributed
from mmcore.inference.engine import Engine, Prompt, Request
from mmcore.models.interleaved import InterleavedModel
from mmcore.models.llava import LlavaModel

# What modules ask when they divide a sequence among tensor ranks.
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def answering(model: LlavaModel | InterleavedModel) -> Iterator[None]:
    """Turn off what is for training alone: a single new token, say, cannot be divided among ranks.

    Afterwards every module is as it was.
    """
    modules = [*model.modules()]
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    before = [
        (owner, name, value)
        for owner in (*modules, *configs.values())
        for name in ("training", *_SEQUENCE_PARALLEL)
        if isinstance(value := getattr(owner, name, None), bool)
    ]
    try:
        for owner, name, _ in before:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def share(count: int) -> range:
    """Of `count` prompts those that this rank's replica answers."""
    return range(distributed.data_parallel_rank(), count, distributed.data_parallel_size())


def generate(
    model: LlavaModel | InterleavedModel,
    prompts: Sequence[Prompt | None],
    *,
    end_ids: tuple[int, ...] = (),
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """Continue every prompt by its most probable tokens. All ranks call it with the same prompts.

    Args:
        prompts: those of other replicas (see `share`) may be None.
        end_ids: tokens that end an answer; they are not part of it.
        max_new_tokens: longest answer.
        batch_size: most prompts that are answered at once.
        on_progress: told on a replica's main rank how many prompts a step has finished.
    Returns:
        New tokens of every prompt, in order, on every rank.
    """
    mine: list[tuple[int, Prompt]] = []
    for index in share(len(prompts)):
        prompt = prompts[index]
        assert prompt is not None
        mine.append((index, prompt))
    max_length = max((len(prompt.tokens) for _, prompt in mine), default=0) + max_new_tokens
    answers: dict[int, list[int]] = {}
    with answering(model):
        engine = Engine(model, None, max_batch_size=min(batch_size, len(mine)), max_length=max_length)
        if engine.is_main:
            indices: dict[int, int] = {}
            for index, prompt in mine:
                answers[index] = []
                request = Request(prompt=prompt, max_new_tokens=max_new_tokens, end_ids=end_ids)
                indices[engine.add(request)] = index
            while not engine.is_idle:
                deltas = engine.step()
                for delta in deltas:
                    answers[indices[delta.id]] += delta.tokens
                on_progress(sum(delta.finish_reason != "" for delta in deltas))
            engine.close()
        else:
            engine.follow()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, answers)
    everything = {index: answer for part in gathered for index, answer in part.items()}
    return [everything[index] for index in range(len(prompts))]
