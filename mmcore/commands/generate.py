"""`mmcore generate --checkpoint DIR --task TASK --data PATH --output predictions.jsonl`."""

import hashlib
import os
import random
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mmcore import checkpoint_files as files
from mmcore.config import ParallelConfig
from mmcore.constants import EXIT_DONE, TOKENIZER_DIR
from mmcore.evaluation.scores import sha256
from mmcore.evaluation.task import TASKS, Example, load_task, read_options
from mmcore.inference.parts import Part, Row, publish, read_parts
from mmcore.inference.sampling import Sampling
from mmcore.models.architecture import Architecture, check_layout, load_architecture, newest

if TYPE_CHECKING:
    from mmcore.models.llava import LlavaModel

# The slowest replica is waited for as long as it takes.
PATIENCE = timedelta(days=365)
LOSS = "loss"

# Options that count where the model writes, and where it is asked something at all. --max-new-tokens is let be: scripts
# give it to every task.
_OF_TEXT = ("temperature", "repetition_penalty", "stop")
_OF_ANSWERS = ("images", "prompt", "answer_by", "batch_size", "shuffle_images")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """Let a checkpoint answer a task's examples; start it under torchrun for more than one rank.

    Answers are kept as they come, in OUTPUT.part*: the same command goes on where it was killed. The task loss asks
    nothing: of every sample of a dataset it writes the loss.
    """

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
    """What of the task is chosen, as name=value; what a task has is told for a wrong one."""
    prompt: str = ""
    """Asked instead of the task's own prompt."""
    conversation: str = ""
    """Template of the conversation; the one the checkpoint was trained with if empty."""
    answer_by: Literal["text", "option-loss"] = "text"
    """text: what the model writes; option-loss: of the example's choices the one with the lowest mean loss of its
    tokens."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the end tokens; they are not part of it."""
    temperature: float = 0.0
    """Above 0 tokens are drawn, the more freely the higher; 0 takes the most probable one always."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together have this probability."""
    top_k: int = 0
    """Draw from this many of the most probable tokens; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less probable that the prompt or the answer has already."""
    seed: int = 0
    """Of what is drawn. An example's answer depends on it and the example's id, not on what else is answered."""
    batch_size: int = 64
    """Most examples that are answered at once; answers do not depend on it."""
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
        if "" in self.stop:
            raise ValueError("--stop is empty: such a text ends every answer before it begins")
        if self.sampling.temperature == 0:
            self._refuse(("top_p", "top_k", "seed"), "nothing is drawn without --temperature, such as 1.0")
        if self.answer_by == "option-loss":
            self._refuse(_OF_TEXT, "with --answer-by option-loss the model writes nothing")
        if self.task == LOSS:
            self._refuse((*_OF_ANSWERS, *_OF_TEXT), f"--task {LOSS} asks nothing")

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        """Options that would change nothing."""
        for name in names:
            if (given := getattr(self, name)) != GenerateConfig.__dataclass_fields__[name].default:
                raise ValueError(f"--{name.replace('_', '-')} {given}: {reason}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


# What an answer does not depend on (but for rounding): a run may go on with other values.
_FREE = ("output", "batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "backend")


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
    if config.task == LOSS:
        return losses(config, parallel, architecture, source)
    examples = chosen(config)
    if int(os.environ.get("RANK", 0)) != 0:
        answer(config, parallel, architecture, source, examples, {}, {})
        return EXIT_DONE
    run = fingerprint(config, source)
    if done := read_parts(config.output, run):
        print(f"{len(done)} of {len(examples)} answers are there already: going on", file=sys.stderr)
    answer(config, parallel, architecture, source, examples, run, done)
    rows = read_parts(config.output, run)
    publish(config.output, examples, rows)
    print(f"{len(examples)} answers in {config.output}{_counts(config, examples, rows)}")
    return EXIT_DONE


def chosen(config: GenerateConfig) -> list[Example]:
    """What is asked.

    Raises:
        ValueError: as `Task.examples`; or there is nothing to choose among.
    """
    options = read_options(config.task, config.options)
    examples = load_task(config.task).examples(config.data, config.images, options=options)
    if config.prompt:
        examples = [replace(example, prompt=config.prompt) for example in examples]
    if config.shuffle_images:
        examples = shuffled(examples)
    free = [example.id for example in examples if not example.choices]
    if config.answer_by == "option-loss" and free:
        raise ValueError(
            f"--answer-by option-loss: {len(free)} of {len(examples)} examples of {config.task} have no choices, the "
            f"first is {free[0]}: let the model write, --answer-by text"
        )
    return examples


def shuffled(examples: list[Example]) -> list[Example]:
    """Give every example another one's picture: a seeded cycle, so that none keeps its own."""
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    givers = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(example, images=examples[givers[index]].images) for index, example in enumerate(examples)]


def fingerprint(config: GenerateConfig, source: Path) -> dict[str, Any]:
    """What the answers depend on, by option: a run goes on with the answers of one that had the same."""
    names = [name for name in GenerateConfig.__dataclass_fields__ if name not in _FREE]
    values = {name: getattr(config, name) for name in names}
    values["images"] = str(config.images)
    values["data"] = _digest(config.data)
    values["checkpoint"] = _digest(source)
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def _digest(path: Path) -> str:
    """A file by its content, a checkpoint by the sums that its run has written, another folder by sizes and times."""
    content = path / files.MANIFEST_FILE if path.is_dir() else path
    if content.is_file():
        return f"{path.name} {sha256(content)}"
    stats = [(file.relative_to(path), file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
    text = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in stats)
    return f"{path.name} {hashlib.sha256(text.encode()).hexdigest()}"


def answer(
    config: GenerateConfig,
    parallel: ParallelConfig,
    architecture: Architecture,
    source: Path,
    examples: list[Example],
    run: dict[str, Any],
    done: dict[str, Row],
) -> None:
    """Build the model, load it, and let it answer what is not done yet. All ranks call it.

    Args:
        run: see `fingerprint`; the main rank's counts, as does what is done.
    """
    import torch.distributed as dist

    from mmcore import distributed
    from mmcore.data.tokenizer import load_tokenizer
    from mmcore.inference.generator import share
    from mmcore.inference.predict import Asking, answer_examples
    from mmcore.inference.progress import AnswerProgress

    tokenizer = load_tokenizer(source / TOKENIZER_DIR)
    distributed.initialize(parallel, seed=0)
    told: list[Any] = [set(done), run]
    dist.broadcast_object_list(told, 0)
    left = [example for example in examples if example.id not in told[0]]
    mine = [left[index] for index in share(len(left))]
    if left:
        model = _loaded(config, parallel, architecture, source)
        replicas = distributed.data_parallel_size()
        what = "answers" if replicas == 1 else f"answers of the first of {replicas} replicas"
        part = Part(config.output, distributed.data_parallel_rank(), told[1]) if distributed.is_data_source() else None
        with AnswerProgress(what, len(mine), is_shown=distributed.is_main()) as progress:

            def on_row(row: Row, tokens: int) -> None:
                assert part is not None
                part.add(row)
                progress.advance(1, tokens)

            asking = Asking(
                answer_by=config.answer_by,
                sampling=config.sampling,
                max_new_tokens=config.max_new_tokens,
                stop=config.stop,
                batch_size=config.batch_size,
            )
            answer_examples(model, tokenizer, architecture, mine, asking, on_row)
        if part:
            part.close()
    dist.barrier(dist.new_group(backend="gloo", timeout=PATIENCE))
    distributed.shutdown()


def losses(config: GenerateConfig, parallel: ParallelConfig, architecture: Architecture, source: Path) -> int:
    """Write the loss of each sample of a dataset: see `mmcore.evaluation.loss`."""
    from mmcore import distributed
    from mmcore.data.tokenizer import load_tokenizer
    from mmcore.evaluation.loss import write_losses
    from mmcore.inference.losses import dataset_losses

    split = read_options(LOSS, config.options)["split"]
    tokenizer = load_tokenizer(source / TOKENIZER_DIR)
    distributed.initialize(parallel, seed=0)
    model = _loaded(config, parallel, architecture, source)
    rows = dataset_losses(model, architecture, tokenizer, str(config.data), split)
    if distributed.is_main():
        write_losses(config.output, rows)
        print(f"losses of {len(rows)} samples in {config.output}")
    distributed.shutdown()
    return EXIT_DONE


def _loaded(config: GenerateConfig, parallel: ParallelConfig, architecture: Architecture, source: Path) -> "LlavaModel":
    """This rank's part of the model, in evaluation mode."""
    import torch

    from mmcore import host
    from mmcore.checkpoint import load_checkpoint
    from mmcore.models.llava import LlavaModel, base_config

    half = config.precision == "bf16" or (config.precision == "auto" and host.has_cuda())
    dtype = torch.bfloat16 if half else torch.float32
    model = LlavaModel(architecture, config.backend, **base_config(parallel, dtype)).to(host.device(), dtype).eval()
    load_checkpoint(source, model)
    return model


def _counts(config: GenerateConfig, examples: list[Example], rows: dict[str, Row]) -> str:
    """Of answers that may not be what was wanted."""
    cut = sum(rows[example.id].finish_reason == "length" for example in examples)
    counts = {
        f"cut off at --max-new-tokens {config.max_new_tokens}": cut,
        "empty": sum(not rows[example.id].answer for example in examples),
    }
    found = "; ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f" ({found})" if found else ""
