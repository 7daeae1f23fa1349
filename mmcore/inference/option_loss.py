"""Multiple choice by loss: of the choices, the one that the model finds the least surprising.

The loss of a choice is the mean over its tokens, behind the prompt, of the token's negative log-probability; the token
that would end the answer does not count. Of equal choices the first is taken.

Source: opendatalab/MLLM-DataEngine at 0d6872a, minigpt4/tasks/vqa_blip2.py, evaluate_on_AOKVQA. There "The answer is"
stands before each choice; here stands what the conversation's template has.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcore import distributed, host
from mmcore.inference.engine import Prompt
from mmcore.inference.stages import from_last_stage, run_stages
from mmcore.models.interleaved import InterleavedModel
from mmcore.models.llava import LlavaModel
from mmcore.models.sequence_parallel import packed_segments


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and what may stand behind it."""

    prompt: Prompt
    choices: tuple[list[int], ...]
    """Tokens of each, at least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """Questions with each of their choices, packed: what the main rank tells the others before a pass."""

    tokens: Tensor  # int64 [1, t]
    labels: Tensor  # int64 [1, t]
    positions: Tensor  # int64 [m], of labels that count
    lengths: tuple[int, ...]
    """Of each sequence, a prompt with a choice."""
    images: Tensor | None  # uint8 [n, 3, h, w]
    image_sources: Tensor | None  # int64 [e]


def choose_options(
    model: LlavaModel | InterleavedModel,
    questions: Iterable[Question],
    *,
    max_tokens: int,
    on_chosen: Callable[[int], None],
) -> None:
    """Answer questions; all ranks of a replica call it, in evaluation mode, and the main one alone has the questions.

    Args:
        questions: of no interest on the other ranks.
        max_tokens: most tokens of a pass, but for a single question that has more.
        on_chosen: told the index of the choice, question by question.
    """
    withheld = ("images", "image_sources")
    if not distributed.is_data_source():
        while (row := distributed.broadcast_in_replica(None, withheld)) is not None:
            _losses(model, row)
        return
    for batch in _batches(questions, max_tokens):
        row = distributed.broadcast_in_replica(_packed(model, batch), withheld)
        losses = iter(_losses(model, row).split([len(choice) for question in batch for choice in question.choices]))
        for question in batch:
            means = torch.stack([next(losses).mean() for _ in question.choices])
            on_chosen(int(means.argmin()))
    distributed.broadcast_in_replica(None, withheld)


def _batches(questions: Iterable[Question], max_tokens: int) -> Iterator[list[Question]]:
    batch: list[Question] = []
    room = max_tokens
    for question in questions:
        size = sum(len(question.prompt.tokens) + len(choice) for choice in question.choices)
        if batch and size > room:
            yield batch
            batch, room = [], max_tokens
        batch.append(question)
        room -= size
    if batch:
        yield batch


def _packed(model: LlavaModel | InterleavedModel, batch: Sequence[Question]) -> _Row:
    """Each picture is encoded once: its features go to the places of all choices."""
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    sources: list[Tensor] = []
    num_features = 0
    for question in batch:
        prompt, features = question.prompt, len(question.prompt.images) * model.num_image_embeddings
        own = torch.arange(features) if prompt.image_sources is None else prompt.image_sources
        for choice in question.choices:
            # The last token of the prompt predicts the first of the choice.
            first = len(tokens) + len(prompt.tokens) - 1
            sequence = [*prompt.tokens, *choice]
            tokens += sequence
            labels += [*sequence[1:], 0]
            positions += range(first, first + len(choice))
            lengths.append(len(sequence))
            sources.append(own + num_features * (own >= 0))
        num_features += features
    images = [question.prompt.images for question in batch if len(question.prompt.images)]
    # A label is looked at only where a choice is predicted: a picture's placeholder is no token.
    counted = torch.zeros(len(labels), dtype=torch.bool)
    counted[positions] = True
    return _Row(
        tokens=torch.tensor([tokens]),
        labels=torch.tensor([labels]).where(counted, 0),
        positions=torch.tensor(positions),
        lengths=tuple(lengths),
        images=torch.cat(images) if images else None,
        image_sources=torch.cat(sources) if images else None,
    )


@torch.no_grad()
def _losses(model: LlavaModel | InterleavedModel, row: _Row) -> Tensor:
    """Of each token of each choice: float32 [m], on every rank."""
    boundaries = torch.tensor((0, *row.lengths)).cumsum(0).to(host.device(), torch.int32)
    longest = max(row.lengths)
    packed = packed_segments(boundaries, longest)
    options = {"labels": row.labels, "positions": row.positions, "packed_seq_params": packed}
    found = run_stages(model, row.tokens, row.images, row.image_sources, **options)
    losses = torch.empty(len(row.positions), device=row.tokens.device) if found is None else found
    from_last_stage(losses)
    return losses
