"""Greedy generation from the live sharded model: batched, with a key-value cache, at any TP, PP, DP."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore import distributed, host
from mmcore.data.batch import join_image_sources
from mmcore.models.llava import LlavaModel

from megatron.core import parallel_state  # isort: skip  (after mmcore.host, which mends it)
from megatron.core.inference.contexts import StaticInferenceContext  # isort: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request, laid out by the data side."""

    tokens: list[int]
    """Placeholders of image embeddings included."""
    images: Tensor  # uint8 [n, 3, h, w]; n is 0 on later pipeline stages
    image_sources: Tensor | None = None  # int64 [e]; feature of `images` that each place takes, -1 the newline


# What modules ask when they divide a sequence among tensor ranks.
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def answering(model: LlavaModel) -> Iterator[None]:
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
    model: LlavaModel,
    prompts: Sequence[Prompt | None],
    *,
    end_id: int,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """Continue every prompt by its most probable tokens. All ranks call it with the same prompts.

    Prompts of one length are batched together: no padding, no mask, and an answer that does not
    depend on its neighbours.

    Args:
        prompts: those of other replicas (see `share`) may be None.
        end_id: token that ends an answer; it is not part of the result.
        max_new_tokens: longest answer.
        batch_size: most prompts in one forward pass.
        on_progress: told how many prompts of this replica a batch has finished.
    Returns:
        New tokens of every prompt, in order, on every rank.
    """
    by_length: dict[int, list[tuple[int, Prompt]]] = defaultdict(list)
    for index in share(len(prompts)):
        prompt = prompts[index]
        assert prompt is not None
        by_length[len(prompt.tokens)].append((index, prompt))
    answers: dict[int, list[int]] = {}
    with answering(model):
        for requests in by_length.values():
            for first in range(0, len(requests), batch_size):
                chosen, batch = zip(*requests[first : first + batch_size], strict=True)
                answers.update(zip(chosen, _generate_batch(model, batch, end_id, max_new_tokens), strict=True))
                on_progress(len(chosen))
    gathered: list[Any] = [None] * distributed.data_parallel_size()
    dist.all_gather_object(gathered, answers, group=parallel_state.get_data_parallel_group())
    everything = {index: answer for part in gathered for index, answer in part.items()}
    return [everything[index] for index in range(len(prompts))]


@torch.no_grad()
def _generate_batch(model: LlavaModel, batch: Sequence[Prompt], end_id: int, max_new_tokens: int) -> list[list[int]]:
    device = host.device()
    tokens = torch.tensor([prompt.tokens for prompt in batch], device=device)  # [b, s]
    images = torch.cat([prompt.images for prompt in batch]).to(device) if model.pre_process else None
    num_features = [len(prompt.images) * model.num_image_embeddings for prompt in batch]
    sources = join_image_sources([prompt.image_sources for prompt in batch], num_features)
    sources = None if sources is None else sources.to(device)
    context = StaticInferenceContext(len(batch), tokens.shape[1] + max_new_tokens)
    new = torch.empty(len(batch), 0, dtype=torch.long, device=device)
    while True:
        next_tokens = _forward(model, tokens, images, sources, context)  # [b]
        new = torch.cat([new, next_tokens[:, None]], dim=1)
        if new.shape[1] == max_new_tokens or bool((new == end_id).any(dim=1).all()):
            break
        tokens, images = next_tokens[:, None], None
    rows = new.tolist()
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]


def _forward(
    model: LlavaModel,
    tokens: Tensor,
    images: Tensor | None,
    sources: Tensor | None,
    context: StaticInferenceContext,
) -> Tensor:
    """Run new tokens [b, s] through all stages; the most probable next ones [b] on every rank."""
    group = parallel_state.get_pipeline_model_parallel_group()
    b, s = tokens.shape
    last = torch.arange(1, b + 1, device=tokens.device) * s - 1  # position of each row's last token in [b * s]
    chosen = torch.empty(b, dtype=torch.long, device=tokens.device)
    for chunk in model.chunks:
        if not chunk.pre_process:
            hidden = torch.empty(s, b, model.config.hidden_size, dtype=model.config.params_dtype, device=tokens.device)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group)
            chunk.set_input_tensor([hidden])
        output = chunk(tokens, images, image_sources=sources, positions=last, inference_context=context)
        if chunk.post_process:
            chosen = output.argmax(dim=-1)  # [b]
        else:
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group)
    context.sequence_len_offset += s
    context.enable_decode_mode()
    if dist.get_world_size(group) > 1:
        dist.broadcast(chosen, parallel_state.get_pipeline_model_parallel_last_rank(), group)
    return chosen
