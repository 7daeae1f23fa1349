"""`mmcore generate --checkpoint DIR --task TASK --data PATH --output predictions.jsonl`."""

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmcore.config import ParallelConfig
from mmcore.constants import EXIT_DONE, TOKENIZER_DIR
from mmcore.evaluation.predictions import write_predictions
from mmcore.evaluation.task import TASKS, Example, load_task, read_options
from mmcore.models.architecture import Architecture, check_layout, load_architecture, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """Let a checkpoint answer a task's examples; start it under torchrun for more than one rank."""

    checkpoint: Path
    """Folder that combine.py or mmcore train wrote; of a run, its newest checkpoint is taken."""
    task: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(TASKS) + "}")]
    """Whose examples and prompts are used."""
    data: Path
    """The task's data file."""
    output: Path
    """Predictions, JSONL: id, prompt, answer."""
    images: Path | None = None
    """Folder of the pictures; by default `images` beside the data file, or the data file's folder."""
    options: tuple[str, ...] = ()
    """What of the task is chosen, as name=value; `mmcore evaluate --help` lists them."""
    prompt: str = ""
    """Asked instead of the task's own prompt."""
    conversation: str = ""
    """Template of the conversation; the one the checkpoint was trained with if empty."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    batch_size: int = 64
    """Most prompts in one forward pass."""
    shuffle_images: bool = False
    """Blind control: every example gets another example's picture. What is right then is guessed."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the weights; auto is bf16 on a GPU and fp32 elsewhere."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages that the language model's layers are cut into."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Kernels: auto takes Transformer Engine where it and CUDA are there."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")


def main(argv: list[str]) -> int:
    config = tyro.cli(GenerateConfig, prog="mmcore generate", args=argv)
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
    )
    source = newest(config.checkpoint)
    architecture = load_architecture(source)
    if architecture.vision is None or architecture.language is None or architecture.vision_projection is None:
        raise ValueError(f"{source} is one tower of a model: join it with the other by tools/converters/combine.py")
    if config.conversation:
        architecture = replace(architecture, conversation=config.conversation)
    check_layout(architecture, parallel)
    parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", 1)))
    options = read_options(config.task, config.options)
    examples = load_task(config.task).examples(config.data, config.images, options=options)
    if config.prompt:
        examples = [replace(example, prompt=config.prompt) for example in examples]
    if config.shuffle_images:
        examples = shuffled(examples)
    answers = answer(config, parallel, architecture, source, examples)
    if int(os.environ.get("RANK", 0)) == 0:
        write_predictions(config.output, examples, answers)
        print(f"{len(answers)} answers in {config.output}")
    return EXIT_DONE


def shuffled(examples: list[Example]) -> list[Example]:
    """Give every example another one's picture: a seeded cycle, so that none keeps its own."""
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    givers = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(example, images=examples[givers[index]].images) for index, example in enumerate(examples)]


def answer(
    config: GenerateConfig, parallel: ParallelConfig, architecture: Architecture, source: Path, examples: list[Example]
) -> list[str]:
    """Build the model, load it, and let it answer."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from mmcore import distributed, host
    from mmcore.checkpoint import load_checkpoint
    from mmcore.data.tokenizer import load_tokenizer
    from mmcore.inference.answers import answer_texts, layout
    from mmcore.models.llava import LlavaModel, base_config

    tokenizer = load_tokenizer(source / TOKENIZER_DIR)
    prompts = [layout(example, tokenizer, architecture) for example in examples]
    distributed.initialize(parallel, seed=0)
    half = config.precision == "bf16" or (config.precision == "auto" and host.has_cuda())
    dtype = torch.bfloat16 if half else torch.float32
    model = LlavaModel(architecture, config.backend, **base_config(parallel, dtype)).to(host.device(), dtype)
    load_checkpoint(source, model)
    console = Console(stderr=True)
    with Progress(console=console, disable=not (console.is_terminal and distributed.is_main())) as progress:
        task = progress.add_task("generating", total=len(prompts) // distributed.data_parallel_size())
        texts = answer_texts(
            model,
            prompts,
            tokenizer,
            architecture.conversation,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            on_progress=lambda count: progress.advance(task, count),
        )
    distributed.shutdown()
    return texts
