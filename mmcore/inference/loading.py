"""A checkpoint as a model that answers, at any layout: what `mmcore chat` and `mmcore serve` begin with.

Nothing heavy is imported before the options are known to fit.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmcore.config import ParallelConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.models.architecture import Architecture, check_layout, load_architecture, newest

if TYPE_CHECKING:
    from mmcore.data.tokenizer import Tokenizer
    from mmcore.inference.engine import Engine
    from mmcore.inference.standby import Standby


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Options of every command that keeps a model to talk to."""

    checkpoint: Path
    """Folder that combine.py or mmcore train wrote; of a run, its newest checkpoint is taken."""
    conversation: str = ""
    """Template of the conversation; the one the checkpoint was trained with if empty."""
    max_length: int = 0
    """Longest conversation with its answer, in tokens, pictures included: each that is answered at once takes memory
    for so many. 0 is what the model was made for, up to 8192."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the weights; auto is bf16 on a GPU and fp32 elsewhere."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; start them with torchrun."""
    pipeline_model_parallel_size: int = 1
    """Stages that the language model's layers are cut into."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Kernels: auto takes Transformer Engine where it and CUDA are there."""

    def __post_init__(self) -> None:
        if self.max_length < 0:
            raise ValueError(f"--max-length must not be negative, but is {self.max_length}")


DEFAULT_MAX_LENGTH = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint that fits its options."""

    folder: Path
    architecture: Architecture
    max_length: int
    parallel: ParallelConfig


def check(config: ModelConfig) -> Source:
    """Everything that can be said before torch is there.

    Raises:
        ValueError: no checkpoint, one tower only, or a layout or length that it cannot take.
    """
    folder = newest(config.checkpoint)
    architecture = load_architecture(folder)
    language = architecture.language
    if architecture.vision is None or language is None or architecture.vision_projection is None:
        raise ValueError(f"{folder} is one tower of a model: join it with the other by tools/converters/combine.py")
    if config.conversation:
        architecture = replace(architecture, conversation=config.conversation)
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
    )
    check_layout(architecture, parallel)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if (replicas := parallel.data_parallel_size(world_size)) > 1:
        raise ValueError(
            f"{world_size} ranks make {replicas} models where one is to answer: start {world_size // replicas}, or "
            "raise --tensor-model-parallel-size or --pipeline-model-parallel-size"
        )
    longest = language.max_position_embeddings
    if config.max_length > longest:
        raise ValueError(f"--max-length {config.max_length} is more than the {longest} that {folder} was made for")
    max_length = config.max_length or min(longest, DEFAULT_MAX_LENGTH)
    return Source(folder=folder, architecture=architecture, max_length=max_length, parallel=parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that answers, on each of its ranks."""

    tokenizer: "Tokenizer"
    end_ids: tuple[int, ...]
    engine: "Engine"
    standby: "Standby"


@contextmanager
def loaded(config: ModelConfig, source: Source, max_batch_size: int) -> Iterator[Loaded]:
    """Bring up the ranks and load the model; all ranks enter, and the main one lets the others go when it leaves.

    Raises:
        ValueError: unknown template, no tokenizer, or a damaged checkpoint.
    """
    import torch

    from mmcore import distributed, host
    from mmcore.checkpoint import load_checkpoint
    from mmcore.data.tokenizer import load_tokenizer
    from mmcore.inference.answers import end_ids
    from mmcore.inference.engine import Engine
    from mmcore.inference.standby import Standby
    from mmcore.models.llava import LlavaModel, base_config

    tokenizer = load_tokenizer(source.folder / TOKENIZER_DIR)
    ends = end_ids(tokenizer, source.architecture.conversation)
    distributed.initialize(source.parallel, seed=0)
    half = config.precision == "bf16" or (config.precision == "auto" and host.has_cuda())
    dtype = torch.bfloat16 if half else torch.float32
    model = LlavaModel(source.architecture, config.backend, **base_config(source.parallel, dtype))
    model = model.to(host.device(), dtype).eval()
    load_checkpoint(source.folder, model)
    engine = Engine(model, tokenizer, max_batch_size=max_batch_size, max_length=source.max_length)
    standby = Standby(engine)
    try:
        if engine.is_main:
            _warm_up(engine, standby, tokenizer)
        yield Loaded(tokenizer=tokenizer, end_ids=ends, engine=engine, standby=standby)
    finally:
        if engine.is_main:
            standby.release()
    distributed.shutdown()


def _warm_up(engine: "Engine", standby: "Standby", tokenizer: "Tokenizer") -> None:
    """Answer something by a token: what is built or taken the first time is there before anyone waits for it.

    Raises:
        ValueError: the memory does not suffice.
    """
    import torch

    from mmcore.inference.engine import Prompt, Request

    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    prompt = Prompt(tokens=[start], images=torch.empty(0, 3, 0, 0, dtype=torch.uint8))
    try:
        with standby.awake():
            engine.add(Request(prompt=prompt, max_new_tokens=2, end_ids=()))
            while not engine.is_idle:
                engine.step()
    except torch.OutOfMemoryError:
        raise ValueError(
            f"the GPU has no memory for {engine.max_batch_size} x {engine.max_length} tokens beside the weights: lower "
            "--max-length or --max-batch-size, or share the model among more ranks"
        ) from None
