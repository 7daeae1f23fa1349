"""What a run is: frozen sections, valid from birth; their docstrings are the command line's help.

Imports no torch, so that a wrong option is refused in a fraction of a second.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from mmcore.constants import MODULES


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" or nothing."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {close[0]!r}?" if close else ""


def positive(section: str, owner: Any, *names: str) -> None:
    """Raise a ValueError for the first of the named fields that is not above zero."""
    for name in names:
        if getattr(owner, name) <= 0:
            raise ValueError(f"--{section}.{name.replace('_', '-')} must be above 0, not {getattr(owner, name)}")


def check_patterns(option: str, patterns: Iterable[str]) -> None:
    """Raise a ValueError for the first pattern that cannot name a module or parameter of the model."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{option} {pattern!r} is not a regular expression: {error}") from None
        head = re.match(r"(\w+)(?:\\\.|\.\w|$)", pattern)  # what stands before the first dot, where it is a plain name
        if head and head[1] not in MODULES:
            raise ValueError(
                f"{option} {pattern!r} begins with {head[1]!r}, which is no part of the model"
                f"{nearest(head[1], MODULES)}; the parts are {', '.join(MODULES)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and what of it is trained."""

    checkpoint: str = ""
    """Folder to start from: combine.py's, or another run's. Its model.json is the architecture."""
    vision: str = ""
    """Preset of mmcore.models.presets that the checkpoint's vision tower must be; any if empty."""
    language: str = ""
    """Preset that its language model must be, likewise."""
    projector: str = ""
    """Preset that its projector must be, likewise."""
    freeze: tuple[str, ...] = ()
    """What keeps its weights: vision_model, vision_projection, language_model, or any module or parameter whose whole
    name a regular expression matches, such as 'language_model\\.embedding'."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Kernels: auto takes Transformer Engine where it and CUDA are there."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What of the layers, the vision tower's too, is computed again in the backward pass and so takes no memory until
    then: nothing; their MLPs; or all but their inputs."""

    def __post_init__(self) -> None:
        if set(self.freeze) >= set(MODULES):
            raise ValueError("--model.freeze names every part of the model: nothing would be trained")
        check_patterns("--model.freeze", self.freeze)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over the ranks; the data parallel size is what is left of them."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages that the language model's layers are cut into; the vision tower lives on the first."""
    num_layers_in_first_pipeline_stage: int = 0
    """The language model's layers beside the vision tower; 0 weighs what all stages compute. Training alone asks:
    checkpoints are the same."""
    sequence_parallel: bool = False
    """Share the language model's sequences among tensor ranks wherever they do not share a layer's work: fewer
    activations on each. Only for more than one of them."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the replicas while the backward pass still makes others."""
    overlap_param_gather: bool = False
    """Hand round the weights that the replicas updated while the next forward pass runs on those that are there. Needs
    overlap-grad-reduce, which cuts them into the portions that are handed round."""

    def __post_init__(self) -> None:
        positive("parallel", self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        first = self.num_layers_in_first_pipeline_stage
        if first < 0 or (first and self.pipeline_model_parallel_size == 1):
            raise ValueError(
                f"--parallel.num-layers-in-first-pipeline-stage {first} with --parallel.pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size}: it is a number of layers, for two stages or more"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "--parallel.sequence-parallel shares sequences among tensor ranks, and there is one: give "
                "--parallel.tensor-model-parallel-size 2 or more, or leave it out"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("--parallel.overlap-param-gather needs --parallel.overlap-grad-reduce: give both")

    def data_parallel_size(self, world_size: int) -> int:
        """Model replicas among `world_size` ranks.

        Raises:
            ValueError: the ranks cannot be dealt out evenly.
        """
        tensor, pipeline = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if world_size % (tensor * pipeline):
            raise ValueError(
                f"{world_size} ranks cannot be dealt to replicas of {tensor * pipeline} (tensor {tensor} x pipeline "
                f"{pipeline}): start a multiple of {tensor * pipeline} ranks, or change --parallel.*"
            )
        return world_size // (tensor * pipeline)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What the model is trained on."""

    path: str = ""
    """Energon dataset that `mmcore prepare` wrote, or an energon metadataset YAML."""
    conversation: str = ""
    """Template that turns a conversation into tokens; by default the checkpoint's, "plain" for alignment."""
    image_mode: Literal["", "crop", "pad", "squash"] = ""
    """What becomes of pictures that are not square: their middle, a margin, or other proportions; by default the
    checkpoint's."""
    image_resize: Literal["fast", "exact"] = "fast"
    """What resizes pictures: torch in a fifth of the time; or Pillow, as towers were trained and as generation does it,
    from which torch differs by at most 2 of 255 levels and 0.01 on average (tall pictures under Pillow 13: 0.2)."""
    seq_length: int = 1024
    """Longest sequence in tokens, image embeddings included; longer samples are cut, and counted."""
    num_workers: int = 2
    """Loader processes of each data parallel rank; 0 loads in the training process."""
    num_streams: int = 0
    """Parts that the data is dealt to for the whole run. Every number of data parallel ranks that divides it can go on
    with a checkpoint; 0 chooses."""
    shuffle_buffer_size: int = 1000
    """Samples of a stream that are shuffled among each other, beyond the shuffling of blocks of 100; 0 keeps the
    order."""
    packing_buffer_size: int = 256
    """Samples that are looked at to fill rows of seq-length, which batch sizes count then. 0 packs none: each sample is
    a row."""
    max_skipped: float = 0.01
    """Largest fraction of a source's samples that may be skipped because they are broken, of each 1000 in a row."""

    def __post_init__(self) -> None:
        positive("data", self, "seq_length")
        for name in ("num_workers", "num_streams", "shuffle_buffer_size", "packing_buffer_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"--data.{name.replace('_', '-')} must not be negative, but is {getattr(self, name)}")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"--data.max-skipped is a fraction between 0 and 1, not {self.max_skipped}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """A stretch of the run with its own frozen parts, whose learning rate rises and falls within it."""

    name: str = ""
    """What the log calls it."""
    until: int = 0
    """Its last step; 0, for the last stage alone, is the end of the run."""
    freeze: tuple[str, ...] = ()
    """What keeps its weights, as --model.freeze, which does not count where there are stages."""
    lr: float = 0.0
    """Highest learning rate; 0 is --optimizer.lr. min-lr and module-lr go up and down with it."""

    def __post_init__(self) -> None:
        if set(self.freeze) >= set(MODULES):
            raise ValueError(f"stage {self.name!r} of train.stages freezes every part: nothing would be trained")
        check_patterns("train.stages: freeze", self.freeze)
        if self.lr < 0:
            raise ValueError(f"stage {self.name!r} of train.stages has the learning rate {self.lr}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long, in which batches, in which precision."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 256
    """Rows of one optimizer step, over all replicas; see data.packing-buffer-size."""
    micro_batch_size: int = 1
    """Rows of one forward pass on one replica."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of weights and activations; the optimizer keeps fp32 masters."""
    seed: int = 1234
    """Seed of initialisation and of the data's order."""
    stages: tuple[StageConfig, ...] = ()
    """Stages of freezing, one after the other, from YAML: a list of name, until, freeze and lr."""
    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    """What follows a step whose loss or gradient is not finite or whose gradient is a spike: stop; skip leaves the
    weights alone; rewind goes back to the last checkpoint. The data moves on."""
    spike_factor: float = 0.0
    """A gradient is a spike when its norm is this many times the median of the last 100 good steps; 0 finds none."""
    max_bad_steps: int = 10
    """Bad steps that may follow each other, or rewinds to one checkpoint, before the run stops."""
    val_interval: int = 0
    """Steps between losses on the dataset's val split, and one after the last step; 0 for none."""
    val_batches: int = 10
    """Global batches of such a loss, the same ones each time."""

    def __post_init__(self) -> None:
        positive("train", self, "max_bad_steps", "steps", "global_batch_size", "micro_batch_size", "val_batches")
        if self.val_interval < 0:
            raise ValueError(f"--train.val-interval must not be negative, but is {self.val_interval}")
        if self.spike_factor and not self.spike_factor > 1:
            raise ValueError(f"--train.spike-factor must be above 1, or 0 for none, not {self.spike_factor}")
        ends = self.stage_ends()
        if any(first >= second for first, second in zip((0, *ends), ends, strict=False)) or ends[-1] != self.steps:
            raise ValueError(
                f"train.stages end at steps {', '.join(map(str, ends))}: they must grow, and the last must be "
                f"--train.steps {self.steps}, or 0 for the same"
            )

    def stage_ends(self) -> tuple[int, ...]:
        """Last step of each stage; of a run without stages its own."""
        ends = [stage.until for stage in self.stages] or [0]
        return (*ends[:-1], ends[-1] or self.steps)

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Forward passes of one step on one replica.

        Raises:
            ValueError: the global batch cannot be dealt out evenly.
        """
        samples = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % samples:
            raise ValueError(
                f"--train.global-batch-size {self.global_batch_size} is not a multiple of --train.micro-batch-size "
                f"{self.micro_batch_size} x {data_parallel_size} data parallel ranks: change one of them, or start "
                "fewer ranks"
            )
        return self.global_batch_size // samples


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; names are mcore's."""

    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from 0."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls to min-lr at the last step."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay; norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    module_lr: tuple[str, ...] = ()
    """Highest learning rates of parts of the model, such as vision_model=2e-6: names as of --model.freeze, of which the
    last that fits counts. Their schedule is that of lr, min-lr in proportion."""

    def __post_init__(self) -> None:
        positive("optimizer", self, "lr")
        check_patterns("--optimizer.module-lr", self.module_rates())
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"--optimizer.min-lr {self.min_lr} must lie between 0 and --optimizer.lr {self.lr}")

    def module_rates(self) -> dict[str, float]:
        """Learning rates by pattern.

        Raises:
            ValueError: an entry is not NAME=RATE.
        """
        rates = {}
        for entry in self.module_lr:
            pattern, _, rate = entry.rpartition("=")
            try:
                rates[pattern] = float(rate)
            except ValueError:
                rates[pattern] = 0.0
            if not pattern or not 0 < rates[pattern] < float("inf"):
                raise ValueError(
                    f"--optimizer.module-lr {entry!r} is not NAME=RATE with a rate above 0, such as vision_model=2e-6; "
                    "what is not to be trained goes to --model.freeze"
                )
        return rates


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Where the run is kept, and how often."""

    save: str = ""
    """Folder of the run: checkpoints, log.jsonl. A run that finds a checkpoint there goes on from it."""
    save_interval: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever, beside the newest; 0 for none."""
    async_save: bool = False
    """Train on while a checkpoint is written, from a copy in the host's memory; published when all ranks are done."""

    def __post_init__(self) -> None:
        positive("checkpoint", self, "save_interval", "keep_last")
        if self.keep_every < 0 or self.keep_every % self.save_interval:
            raise ValueError(
                f"--checkpoint.keep-every {self.keep_every} must be a multiple of --checkpoint.save-interval "
                f"{self.save_interval}, or 0 to keep the newest alone"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """What is told while it runs."""

    log_interval: int = 10
    """Steps between lines on the terminal; log.jsonl has every step."""
    tensorboard_dir: str = ""
    """Folder for TensorBoard; none if empty."""

    def __post_init__(self) -> None:
        positive("logging", self, "log_interval")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        ends = self.train.stage_ends()
        shortest = min(end - start for start, end in zip((0, *ends), ends, strict=False))
        if self.optimizer.lr_warmup_steps >= shortest:
            raise ValueError(
                f"--optimizer.lr-warmup-steps {self.optimizer.lr_warmup_steps} must be below "
                + (f"the {shortest} of the shortest stage" if self.train.stages else f"--train.steps {shortest}")
            )


def merge(config: Any, values: dict[str, Any], where: str, prefix: str = "") -> Any:
    """Replace fields of a config dataclass by a nested dict's values.

    Raises:
        ValueError: an unknown key (names the nearest) or a value of the wrong kind.
    """
    known = {item.name: getattr(config, item.name) for item in fields(config)}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise ValueError(f"{where}: unknown key {name!r}{nearest(key, known)}")
        current = known[key]
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name!r} is a section: it takes keys below it, not {value!r}")
            changes[key] = merge(current, value, where, f"{name}.")
        elif isinstance(item := next(iter(get_args(get_type_hints(type(config))[key])), None), type) and is_dataclass(
            item
        ):
            if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
                raise ValueError(f"{where}: {name!r} is a list of sections, not {value!r}")
            changes[key] = tuple(merge(item(), entry, where, f"{name}.{index}.") for index, entry in enumerate(value))
        else:
            changes[key] = _checked(current, value, name, where)
    return replace(config, **changes)


def _checked(current: Any, value: Any, name: str, where: str) -> Any:
    """`value` as the kind that `current` has: YAML writes 1e-3 as text and a tuple as a list."""
    kind = type(current)
    try:
        if kind is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if kind is float and not isinstance(value, bool):
            return float(value)
        if type(value) is kind:
            return value
    except (TypeError, ValueError):
        pass
    wanted = "list of names" if kind is tuple else kind.__name__
    raise ValueError(f"{where}: {name!r} takes a {wanted}, not {value!r}")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ValueError: missing, unreadable, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {path} must hold sections (model, parallel, data, ...), not {type(content).__name__}"
        )
    return content
