"""What a job of the run is, said when it starts: a line of starts.jsonl, which the run's report reads."""

import socket
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from mmcore import distributed, host
from mmcore.config import RunConfig
from mmcore.models.architecture import Architecture
from mmcore.models.parameters import num_parameters
from mmcore.training.ends import append_row
from mmcore.training.freezing import is_named, named_parameters
from mmcore.training.stages import stages

START_LOG = "starts.jsonl"


def trainable_sizes(model: nn.Module) -> dict[str, int]:
    """Numbers in each parameter that the whole model can train, by name, from all ranks, which all call it."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    local = {
        name: parameter.numel() * (size if getattr(parameter, "tensor_model_parallel", False) else 1)
        for name, parameter in named_parameters(model)
        if parameter.requires_grad and not getattr(parameter, "shared", False)  # mcore's copy on the last stage
    }
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, local)
    return {name: numel for sizes in found for name, numel in sizes.items()}


def write_start(step: int, config: RunConfig, architecture: Architecture, sizes: Mapping[str, int]) -> None:
    """Add this job to the run's, unless all is done already.

    Args:
        step: steps that are done already.
        sizes: as `trainable_sizes` gives them.
    """
    if step >= config.train.steps:
        return
    row = {
        "step": step,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "device": host.device().type,
        "world_size": dist.get_world_size(),
        "data_parallel_size": distributed.data_parallel_size(),
        "parameters": num_parameters(architecture),
        "trained": [
            sum(numel for name, numel in sizes.items() if not any(is_named(name, part) for part in stage.freeze))
            for stage in stages(config)
        ],
        "config": asdict(config),
    }
    append_row(Path(config.checkpoint.save) / START_LOG, row)
