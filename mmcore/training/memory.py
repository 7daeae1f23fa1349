"""How much memory a rank needs before any activation, and its host at a save. Imports no torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mmcore.checkpoint_files import OPTIMIZER_BYTES
from mmcore.config import ParallelConfig
from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import Architecture
from mmcore.models.parameters import num_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBytes:
    """Of one rank."""

    weights: int
    """Of all that the rank holds, trained or not, with what is kept of it in FP8."""
    gradients: int
    """Of what is trained; every replica holds all of its part of the model."""
    masters: int
    """What weights lack of float32; dealt to the replicas."""
    moments: int
    """AdamW's two; dealt to the replicas."""
    copies: int
    """Of the host's memory, from the beginning of a save to its end: masters and moments in float32, dealt to the
    replicas, and on the first replica all weights. A thaw takes the former, for a moment."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments

    def __str__(self) -> str:
        numbers = (self.total, self.weights, self.gradients, self.masters + self.moments)
        whole, *parts = (f"{number / 1e9:.3g}" for number in numbers)
        return f"{whole} GB (weights {parts[0]}, gradients {parts[1]}, optimizer {parts[2]})"


def training_bytes(
    architecture: Architecture,
    frozen: Collection[str],
    parallel: ParallelConfig,
    *,
    data_parallel_size: int,
    layers: Sequence[int],
    precision: Literal["fp32", "bf16"],
    states: Literal["full", "lean"],
    fp8: Collection[str] = (),
) -> list[TrainingBytes]:
    """Of a rank of each pipeline stage.

    Not counted: the buffers' padding, and that norms and some biases are whole on every tensor rank (each below 0.1 %
    of a real model). Counted as trained: vision layers above the one whose features are taken. Beside it lie
    activations, and for moments: in an update, 512 MiB of lean states' parts turned to float32; at a save, a thaw or a
    load, at most 16 bytes for each number of the largest parameter; of the host at a load, 1 GiB.

    Args:
        frozen: parts that are not trained, of `mmcore.constants.MODULES`.
        layers: of the language model on each stage, as `mmcore.models.pipeline.plan_layers` says.
        precision: of the run (`--train.precision`).
        states: of the optimizer (`--optimizer.states`).
        fp8: parts whose layers are computed in FP8: a copy of each weight and one of its transpose.
    """
    weight = 2 if precision == "bf16" else 4
    gradient = 2 if states == "lean" else 4
    master = {"fp32": 0, "bf16": 2 if states == "lean" else 4}[precision]
    moment = 2 if states == "lean" else 4
    found = []
    for parts, own_layers in zip(stage_parameters(architecture, layers), layers, strict=True):
        held = sum(parts.values()) // parallel.tensor_model_parallel_size
        copied = own_layers * _layer(architecture) * (LANGUAGE_MODEL in fp8)
        copied += parts.get(VISION_MODEL, 0) * (VISION_MODEL in fp8)
        trained = sum(count for part, count in parts.items() if part not in frozen)
        trained //= parallel.tensor_model_parallel_size
        own = -(-trained // data_parallel_size)
        found.append(
            TrainingBytes(
                weights=held * weight + 2 * copied // parallel.tensor_model_parallel_size,
                gradients=trained * gradient,
                masters=own * master,
                moments=2 * own * moment,
                copies=own * OPTIMIZER_BYTES + held * weight,
            )
        )
    return found


def check_host(
    weights: int, states: int, parallel: ParallelConfig, world_size: int, local_world_size: int, memory: int | None
) -> None:
    """Refuse a run whose first machine cannot hold what a save copies there, the training itself not counted.

    Args:
        weights: bytes of all weights.
        states: bytes of masters and moments in a checkpoint.
        local_world_size: ranks on the machine.
        memory: as `host_memory` gives it.
    Raises:
        ValueError: names what is needed and what there is.
    """
    stage = world_size // parallel.pipeline_model_parallel_size
    # Ranks count tensor ranks first, then replicas, then stages (megatron-core's order "tp-cp-ep-dp-pp").
    first = sum(rank % stage < parallel.tensor_model_parallel_size for rank in range(local_world_size))
    parts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    needed = states * local_world_size // world_size + weights * first // parts
    if memory is not None and needed > memory:
        raise ValueError(
            f"a checkpoint goes through the host's memory: --checkpoint.save-interval needs {needed / 1e9:.3g} GB of "
            f"it for the {local_world_size} ranks of a machine, which has {memory / 1e9:.3g} GB. Take more machines, "
            "freeze more (--model.freeze), or write none (--checkpoint.save-interval 0)"
        )


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this machine lets its processes have, its container's limit considered; None where it does not tell.

    Args:
        root: of the file system that tells it.
    """
    found = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")))
    except (OSError, StopIteration):
        return None
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups 2 and 1
        try:
            found.append(int((root / "sys/fs/cgroup" / limit).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return min(found)


def stage_parameters(architecture: Architecture, layers: Sequence[int]) -> list[dict[str, int]]:
    """Parameters of each part on each pipeline stage."""
    whole, language = num_parameters(architecture), architecture.language
    assert language is not None and sum(layers) == language.num_layers
    table = language.padded_vocab_size * language.hidden_size
    is_shared = language.share_embeddings_and_output_weights
    layer = _layer(architecture)
    above = whole[LANGUAGE_MODEL] - language.num_layers * layer - table  # the last norm, and the output layer
    stages = [{LANGUAGE_MODEL: count * layer} for count in layers]
    stages[0] |= {part: count for part, count in whole.items() if part in (VISION_MODEL, VISION_PROJECTION)}
    stages[0][LANGUAGE_MODEL] += table
    stages[-1][LANGUAGE_MODEL] += above + (table if is_shared and len(layers) > 1 else 0)
    return stages


def _layer(architecture: Architecture) -> int:
    """Parameters of one layer of the language model."""
    language = architecture.language
    assert language is not None
    fewer = replace(architecture, language=replace(language, num_layers=language.num_layers - 1))
    return num_parameters(architecture)[LANGUAGE_MODEL] - num_parameters(fewer)[LANGUAGE_MODEL]
