"""What a run is: frozen sections, valid from birth; their docstrings are the command line's help.

Imports no torch, so that a wrong option is refused in a fraction of a second.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from mmcore.checks import check_patterns, positive
from mmcore.constants import MODULES


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
    context_parallel_size: int = 1
    """Ranks that share each sequence of the language model, for ones that are too long for one: each has all the
    weights, sees all the pictures, and keeps the activations of its positions."""
    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers on each stage, which a micro batch visits in turns: stages wait less while the pipeline fills
    and empties, and send more. The micro batches of a step must be a multiple of the stages."""
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
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
        positive("parallel", self, *names, "context_parallel_size")
        first, chunks = self.num_layers_in_first_pipeline_stage, self.virtual_pipeline_model_parallel_size
        if chunks > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"--parallel.virtual-pipeline-model-parallel-size {chunks} cuts the stages of a pipeline, and there is "
                "one: give --parallel.pipeline-model-parallel-size 2 or more, or leave it out"
            )
        if 0 < first < chunks:
            raise ValueError(
                f"--parallel.num-layers-in-first-pipeline-stage {first} is less than the "
                f"--parallel.virtual-pipeline-model-parallel-size {chunks} of its chunks: each needs a layer"
            )
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

    @property
    def microbatch_multiple(self) -> int:
        """What the micro batches of a step must be a multiple of."""
        return self.pipeline_model_parallel_size if self.virtual_pipeline_model_parallel_size > 1 else 1

    def data_parallel_size(self, world_size: int) -> int:
        """Model replicas among `world_size` ranks.

        Raises:
            ValueError: the ranks cannot be dealt out evenly.
        """
        tensor, pipeline, context = (
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.context_parallel_size,
        )
        size = tensor * pipeline * context
        if world_size % size:
            sizes = f"tensor {tensor} x pipeline {pipeline}" + (f" x context {context}" if context > 1 else "")
            raise ValueError(
                f"{world_size} ranks cannot be dealt to replicas of {size} ({sizes}): start a multiple of {size} "
                "ranks, or change --parallel.*"
            )
        return world_size // size


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
    rampup_batch_size: tuple[int, ...] = ()
    """Begin with smaller steps: START INCREMENT ROWS. Steps have START rows, and INCREMENT more each time that an equal
    part of the first ROWS rows of the run is done, until they have global-batch-size. All count rows, as that does."""
    loss_weighting: Literal["tokens", "sqrt_turn"] = "tokens"
    """What a trained token counts: tokens, each 1; sqrt_turn, 1/sqrt(n) in an answer of n trained tokens, so that long
    answers weigh more than short ones but not in proportion. The loss divides by the sum over the global batch."""
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
        self._check_rampup()
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

    def _check_rampup(self) -> None:
        if not self.rampup_batch_size:
            return
        text = f"--train.rampup-batch-size {' '.join(map(str, self.rampup_batch_size))}"
        if len(self.rampup_batch_size) != 3 or min(self.rampup_batch_size) <= 0:
            raise ValueError(f"{text} is not START INCREMENT ROWS, three numbers above 0")
        start, increment, _ = self.rampup_batch_size
        if start >= self.global_batch_size or (self.global_batch_size - start) % increment:
            raise ValueError(
                f"{text} does not grow from {start} by {increment} to --train.global-batch-size "
                f"{self.global_batch_size}: the way between must be a multiple of {increment}"
            )

    def batch_sizes(self) -> tuple[int, ...]:
        """Rows that a step of the run can have, growing; the last is the global batch."""
        start, increment, _ = self.rampup_batch_size or (self.global_batch_size, 1, 0)
        return tuple(range(start, self.global_batch_size + 1, increment))

    def batch_size(self, step: int) -> int:
        """Rows of a step, from 1: the same however often, and on however many ranks, the run was resumed."""
        return self.rows_before(step + 1) - self.rows_before(step)

    def rows_before(self, step: int) -> int:
        """Rows of all steps before one, from 1.

        A step's size goes by the rows that were done before it, as Megatron-LM's by its samples: with k
        increments on the way, size number i from `i * ROWS / k` of them on.
        """
        *growing, whole = self.batch_sizes()
        rows, steps = 0, step - 1
        for index, size in enumerate(growing, 1):
            end = self.rampup_batch_size[2] * index
            fitting = min(steps, max(0, -(-(end - rows * len(growing)) // (size * len(growing)))))
            rows, steps = rows + fitting * size, steps - fitting
        return rows + steps * whole

    def num_microbatches(self, data_parallel_size: int, rows: int = 0) -> int:
        """Forward passes of one step on one replica.

        Args:
            rows: of the step; those of the global batch if left out.
        Raises:
            ValueError: they cannot be dealt out evenly.
        """
        rows, samples = rows or self.global_batch_size, self.micro_batch_size * data_parallel_size
        if rows % samples:
            what = f"--train.global-batch-size {rows}"
            if rows != self.global_batch_size:
                what = f"--train.rampup-batch-size {' '.join(map(str, self.rampup_batch_size))}: {rows} rows on the way"
            raise ValueError(
                f"{what} is not a multiple of --train.micro-batch-size {self.micro_batch_size} x {data_parallel_size} "
                "data parallel ranks: change one of them, or start fewer ranks"
            )
        return rows // samples

    def check_batch_sizes(self, data_parallel_size: int, multiple: int = 1) -> None:
        """Raise a ValueError for the first step size of the run that cannot be dealt out evenly.

        Args:
            multiple: as of `ParallelConfig.microbatch_multiple`.
        """
        for rows in self.batch_sizes():
            number = self.num_microbatches(data_parallel_size, rows)
            if number % multiple:
                raise ValueError(
                    f"a step of {rows} rows is {number} micro batches on each replica, but with "
                    "--parallel.virtual-pipeline-model-parallel-size they must be a multiple of the "
                    f"{multiple} pipeline stages: change --train.global-batch-size, --train.rampup-batch-size or "
                    "--train.micro-batch-size"
                )


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
    states: Literal["full", "lean"] = "full"
    """What is kept of a bf16 weight that is trained: full, 16 bytes beside it, which are a float32 gradient, master and
    two moments; lean, 8, a bf16 gradient and moments and the 16 bits that the master has more than the weight.
    Checkpoints are the same. Lean moments cannot follow a slow average: adam-beta2 must be at most 0.99."""

    def __post_init__(self) -> None:
        positive("optimizer", self, "lr")
        check_patterns("--optimizer.module-lr", self.module_rates())
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"--optimizer.min-lr {self.min_lr} must lie between 0 and --optimizer.lr {self.lr}")
        if self.states == "lean" and self.adam_beta2 > 0.99:
            raise ValueError(
                f"--optimizer.states lean with --optimizer.adam-beta2 {self.adam_beta2}: moments in bf16 lose changes "
                "below 1/256, so the second one would stand still; give 0.99 or less, or --optimizer.states full"
            )

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
    """Folder of the run: checkpoints, log.jsonl, report.html. A run that finds a checkpoint there goes on from it."""
    save_interval: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever, beside the newest; 0 for none."""
    keep_best: int = 0
    """Best checkpoints that stay beside these, by --eval.metric or, without --eval.task, by validation loss."""
    async_save: bool = False
    """Train on while a checkpoint is written, from a copy in the host's memory; published when all ranks are done."""

    def __post_init__(self) -> None:
        positive("checkpoint", self, "save_interval", "keep_last")
        if self.keep_every < 0 or self.keep_every % self.save_interval:
            raise ValueError(
                f"--checkpoint.keep-every {self.keep_every} must be a multiple of --checkpoint.save-interval "
                f"{self.save_interval}, or 0 to keep the newest alone"
            )
        if self.keep_best < 0:
            raise ValueError(f"--checkpoint.keep-best must not be negative, but is {self.keep_best}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Scores while training: the model, as it is then, answers a task's examples."""

    task: str = ""
    """Task of `mmcore evaluate` whose examples, prompts and rules count; none if empty."""
    data: str = ""
    """The task's own file."""
    images: str = ""
    """Folder of its pictures; by default `images` beside the file, or the file's folder."""
    interval: int = 0
    """Steps between scores, and there is one after the last step."""
    num_samples: int = 0
    """Examples that are answered, drawn from the file once for all; 0 for all of them."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    batch_size: int = 16
    """Most prompts in one forward pass; their key-value cache needs memory beside what training holds."""
    metric: str = ""
    """What checkpoints are compared by; by default the number that the task is known by. The log has all of them."""
    tokenizer: Literal["auto", "ptb", "python", "none"] = "auto"
    """How captions are cut into words, as in `mmcore evaluate`."""

    def __post_init__(self) -> None:
        positive("eval", self, "max_new_tokens", "batch_size")
        for name in ("interval", "num_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"--eval.{name.replace('_', '-')} must not be negative, but is {getattr(self, name)}")
        given = [item.name.replace("_", "-") for item in fields(self) if getattr(self, item.name) != item.default]
        if given and not self.task:
            raise ValueError(f"--eval.{given[0]} without --eval.task: name the task that the model is to be scored on")
        if self.task and not self.interval:
            raise ValueError(f"--eval.task {self.task} without --eval.interval: give the steps between scores")
        if self.task and not self.data:
            raise ValueError(f"--eval.task {self.task} without --eval.data: give the file of its examples")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """What is told while it runs."""

    log_interval: int = 10
    """Steps between lines on the terminal; log.jsonl has every step."""
    tensorboard_dir: str = ""
    """Folder for TensorBoard; none if empty."""
    wandb_project: str = ""
    """Project of Weights & Biases, which has to be installed; none if empty. WANDB_MODE=offline stays on the disk."""
    wandb_name: str = ""
    """What the run is called there; by default as the folder of --checkpoint.save."""

    def __post_init__(self) -> None:
        positive("logging", self, "log_interval")
        if self.wandb_name and not self.wandb_project:
            raise ValueError(f"--logging.wandb-name {self.wandb_name} needs --logging.wandb-project")


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
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.optimizer.states == "lean" and self.train.precision != "bf16":
            raise ValueError(
                "--optimizer.states lean keeps what a bf16 weight lacks of its master, but --train.precision is "
                f"{self.train.precision}: give bf16, or --optimizer.states full"
            )
        if self.eval.task and self.parallel.context_parallel_size > 1:
            raise ValueError(
                f"--eval.task {self.eval.task} with --parallel.context-parallel-size "
                f"{self.parallel.context_parallel_size}: ranks that share a sequence cannot answer, since the "
                "key-value cache is not cut. Score the checkpoints by `mmcore generate`; --train.val-interval works"
            )
        if self.checkpoint.keep_best:
            self._check_best()
        ends = self.train.stage_ends()
        shortest = min(end - start for start, end in zip((0, *ends), ends, strict=False))
        if self.optimizer.lr_warmup_steps >= shortest:
            raise ValueError(
                f"--optimizer.lr-warmup-steps {self.optimizer.lr_warmup_steps} must be below "
                + (f"the {shortest} of the shortest stage" if self.train.stages else f"--train.steps {shortest}")
            )

    def _check_best(self) -> None:
        """Every checkpoint has a score of its own step to be compared by."""
        option, interval = "--eval.interval", self.eval.interval
        if not self.eval.task:
            option, interval = "--train.val-interval", self.train.val_interval
        if not interval:
            raise ValueError(
                f"--checkpoint.keep-best {self.checkpoint.keep_best} has nothing to go by: give --eval.task and its "
                "options, or --train.val-interval for the validation loss"
            )
        if self.checkpoint.save_interval % interval:
            raise ValueError(
                f"--checkpoint.keep-best compares checkpoints by the score of their step: --checkpoint.save-interval "
                f"{self.checkpoint.save_interval} must be a multiple of {option} {interval}"
            )
