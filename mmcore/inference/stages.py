"""A pass through all stages of the pipeline, one after the other, and what comes of it on every rank."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.models.interleaved import InterleavedModel
from mmcore.models.llava import LlavaModel

from megatron.core import parallel_state  # isort: skip  (after mmcore.host, which mends it)


def run_stages(
    model: LlavaModel | InterleavedModel, tokens: Tensor, images: Tensor | None, sources: Tensor | None, **options: Any
) -> Tensor | None:
    """Run a row through all stages of the pipeline; all ranks of a replica call it.

    Args:
        tokens: int64 [1, t], on every rank.
        images, sources: as `LlavaModel.forward` takes them; the first stage alone looks at them.
        options: its other arguments. With a cache the logits of each request's newest token come back.
    Returns:
        What the last stage gives; None on the others.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    cache = options.get("inference_context")
    if cache is not None:
        options["positions"] = cache.last
    output = None
    chunk: Any
    for chunk in model.chunks:
        if not chunk.pre_process:
            shape = (tokens.shape[1], 1, model.config.hidden_size)  # [t, 1, h]
            hidden = torch.empty(shape, dtype=model.config.params_dtype, device=tokens.device)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group)
            chunk.set_input_tensor([hidden])
        output = chunk(tokens, images, image_sources=sources, **options)
        if not chunk.post_process:
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group)
            output = None
    return output


def from_last_stage(tensor: Tensor) -> None:
    """Give every rank of a replica what the last stage's first tensor rank has, in place.

    Tensor ranks have the same logits, but what one of them draws is what all go on with.
    """
    group = parallel_state.get_model_parallel_group()
    if dist.get_world_size(group) > 1:
        source = dist.get_process_group_ranks(group)[-parallel_state.get_tensor_model_parallel_world_size()]
        dist.broadcast(tensor, source, group)
