"""Greedy generation from the live sharded model: batched, with a key-value cache, at any TP, PP, DP."""

from collections import defaultdict
from collections.abc import Callable, Sequence
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
    images: Tensor  # uint8 [n, 3, h, w]
    image_sources: Tensor | None = None  # int64 [e]; feature of `images` that each place takes, -1 the newline


def generate(
    model: LlavaModel,
    prompts: Sequence[Prompt],
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
        end_id: token that ends an answer; it is not part of the result.
        max_new_tokens: longest answer.
        batch_size: most prompts in one forward pass.
        on_progress: told how many prompts of this replica a batch has finished.
    Returns:
        New tokens of every prompt, in order, on every rank.
    """
    model.eval()
    size, rank = distributed.data_parallel_size(), distributed.data_parallel_rank()
    by_length: dict[int, list[int]] = defaultdict(list)
    for index in range(rank, len(prompts), size):
        by_length[len(prompts[index].tokens)].append(index)
    answers: dict[int, list[int]] = {}
    for indices in by_length.values():
        for first in range(0, len(indices), batch_size):
            chosen = indices[first : first + batch_size]
            batch = [prompts[index] for index in chosen]
            answers.update(zip(chosen, _generate_batch(model, batch, end_id, max_new_tokens), strict=True))
            on_progress(len(chosen))
    gathered: list[Any] = [None] * size
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
    if not model.pre_process:
        hidden = torch.empty(s, b, model.config.hidden_size, dtype=model.config.params_dtype, device=tokens.device)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group)
        model.set_input_tensor([hidden])
    last = torch.arange(1, b + 1, device=tokens.device) * s - 1  # position of each row's last token in [b * s]
    output = model(tokens, images, image_sources=sources, positions=last, inference_context=context)
    context.sequence_len_offset += s
    context.enable_decode_mode()
    if model.post_process:
        chosen = output.argmax(dim=-1)  # [b]
    else:
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group)
        chosen = torch.empty(b, dtype=torch.long, device=tokens.device)
    if dist.get_world_size(group) > 1:
        dist.broadcast(chosen, parallel_state.get_pipeline_model_parallel_last_rank(), group)
    return chosen
