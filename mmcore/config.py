"""What a run is: frozen sections, valid from birth; their docstrings are the command line's help.

Imports no torch, so that a wrong option is refused in a fraction of a second.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from mmcore.checks import check_patterns, positive
from mmcore.config_train import OptimizerConfig as OptimizerConfig
from mmcore.config_train import StageConfig as StageConfig
from mmcore.config_train import TrainConfig as TrainConfig
from mmcore.constants import LANGUAGE_MODEL, MODULES, VISION_MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and what of it is trained."""

    checkpoint: str = ""
    """Folder to start from: combine.py's, or another run's. Its model.json is the architecture."""
    weights: Literal["checkpoint", "random"] = "checkpoint"
    """Where they begin: as the checkpoint's; or at random, of which it then needs none, to time a model."""
    vision: str = ""
    """Preset of mmcore.models.presets that the checkpoint's vision tower must be; any if empty."""
    language: str = ""
    """Preset that its language model must be, likewise."""
    projector: str = ""
    """Preset that its projector must be, likewise."""
    freeze: tuple[str, ...] = ()
    """What keeps its weights: vision_model, vision_projection, language_model, or any module or parameter whose whole
    name a regular expression matches, such as 'language_model\\.embedding'. Of the layers of a stack all or none."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Kernels: auto takes Transformer Engine where it and CUDA are there."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What of the layers, the vision tower's too, is computed again in the backward pass and so takes no memory until
    then: nothing; their MLPs; or all but their inputs."""
    fp8: Literal["none", "delayed", "tensorwise"] = "none"
    """Matrix products of the language model's layers in FP8, by Transformer Engine on a GPU that has it (L40S, H100 and
    later): delayed scales a tensor by what it was in the last 16 passes, of which a resumed run knows none; tensorwise
    by what it is, which takes a little longer, and a resumed run goes on exactly."""
    fp8_vision: bool = False
    """Also those of the vision tower's layers, always tensorwise."""
    vision_ahead: bool = False
    """Let a frozen tower see the pictures of the next micro batch on a stream of its own, beside the language model.
    For a GPU."""
    language_graphs: bool = False
    """CUDA graphs of the language model's layers in training, for rows so short that the host cannot hand out kernels
    as fast as they end (at 8192 tokens of a 7B model it can). Rows are filled up to multiples of 256 tokens. For models
    that are whole on each GPU, and nothing computed again."""

    @property
    def fp8_parts(self) -> tuple[str, ...]:
        """Parts whose layers are computed in FP8."""
        if self.fp8 == "none":
            return ()
        return (LANGUAGE_MODEL, VISION_MODEL) if self.fp8_vision else (LANGUAGE_MODEL,)

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
    num_layers_in_last_pipeline_stage: int = 0
    """Its layers beside the output layer, likewise; the stages between share the rest."""
    sequence_parallel: bool = False
    """Share the language model's sequences among tensor ranks wherever they do not share a layer's work: fewer
    activations on each. Only for more than one of them."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the replicas while the backward pass still makes others."""
    overlap_param_gather: bool = False
    """Hand round the weights that the replicas updated while the next forward pass runs on those that are there. Needs
    overlap-grad-reduce, which cuts them into the portions that are handed round."""
    distributed_timeout_minutes: int = 10
    """How long ranks wait for each other before the run fails, as where one is dead or reads no data any more. The
    writing of checkpoints and the scorers' time do not count."""

    def __post_init__(self) -> None:
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
        positive("parallel", self, *names, "context_parallel_size", "distributed_timeout_minutes")
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"--parallel.virtual-pipeline-model-parallel-size {chunks} cuts the stages of a pipeline, and there is "
                "one: give --parallel.pipeline-model-parallel-size 2 or more, or leave it out"
            )
        for place in ("first", "last"):
            layers = getattr(self, f"num_layers_in_{place}_pipeline_stage")
            option = f"--parallel.num-layers-in-{place}-pipeline-stage {layers}"
            if 0 < layers < chunks:
                raise ValueError(
                    f"{option} is less than the --parallel.virtual-pipeline-model-parallel-size {chunks} of its "
                    "chunks: each needs a layer"
                )
            if layers < 0 or (layers and self.pipeline_model_parallel_size == 1):
                raise ValueError(
                    f"{option} with --parallel.pipeline-model-parallel-size {self.pipeline_model_parallel_size}: it is "
                    "a number of layers, for two stages or more"
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
    synthetic: bool = False
    """Train on pixels and tokens that are made up, of the lengths of captions or conversations, to time a model."""
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
class CheckpointConfig:
    """Where the run is kept, and how often."""

    save: str = ""
    """Folder of the run: checkpoints, log.jsonl, report.html. A run that finds a checkpoint there goes on from it."""
    save_interval: int = 1000
    """Steps between checkpoints; the last step always writes one. 0 writes none, and needs no --checkpoint.save."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever, beside the newest; 0 for none."""
    keep_best: int = 0
    """Best checkpoints that stay beside these, by --eval.metric or, without --eval.task, by validation loss."""
    async_save: bool = False
    """Train on while a checkpoint is written, from a copy in the host's memory; published when all ranks are done."""

    def __post_init__(self) -> None:
        positive("checkpoint", self, "keep_last")
        if self.save_interval < 0:
            raise ValueError(f"--checkpoint.save-interval must not be negative, but is {self.save_interval}")
        if self.keep_every < 0 or self.keep_every % (self.save_interval or self.keep_every + 1):
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
    options: tuple[str, ...] = ()
    """What of the task's rules is chosen, as name=value: as in `mmcore evaluate`, whose help lists them."""

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
    module_times: bool = False
    """Tell of each step where its time went: tower, projector, language model, output layer, communication that did not
    overlap, optimizer, data. Costs a little."""
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

    def check(self) -> None:
        """Refuse sections that do not fit together. Apart from construction: half of a pair may come from YAML and the
        other half from the command line.

        Raises:
            ValueError: which options, and the mend.
        """
        if self.optimizer.states == "lean" and self.train.precision != "bf16":
            raise ValueError(
                "--optimizer.states lean keeps what a bf16 weight lacks of its master, but --train.precision is "
                f"{self.train.precision}: give bf16, or --optimizer.states full"
            )
        self._check_fp8()
        self._check_vision_ahead()
        self._check_language_graphs()
        if self.eval.task and self.parallel.context_parallel_size > 1:
            raise ValueError(
                f"--eval.task {self.eval.task} with --parallel.context-parallel-size "
                f"{self.parallel.context_parallel_size}: ranks that share a sequence cannot answer, since the "
                "key-value cache is not cut. Score the checkpoints by `mmcore generate`; --train.val-interval works"
            )
        self._check_made_up()
        if self.checkpoint.keep_best:
            self._check_best()
        ends = self.train.stage_ends()
        shortest = min(end - start for start, end in zip((0, *ends), ends, strict=False))
        if self.optimizer.lr_warmup_steps >= shortest:
            raise ValueError(
                f"--optimizer.lr-warmup-steps {self.optimizer.lr_warmup_steps} must be below "
                + (f"the {shortest} of the shortest stage" if self.train.stages else f"--train.steps {shortest}")
            )

    def _check_made_up(self) -> None:
        """Without a checkpoint there is no tokenizer."""
        if self.data.synthetic and (self.data.path or self.train.val_interval):
            raise ValueError("--data.synthetic makes up samples to train on: leave out --data.path and val-interval")
        if self.data.synthetic and self.train.loss_weighting != "tokens":
            raise ValueError(
                f"--train.loss-weighting {self.train.loss_weighting} weighs answers, and --data.synthetic makes up "
                "none: leave out one of them"
            )
        if self.model.weights == "checkpoint" or self.model.checkpoint:
            return
        if not self.data.synthetic or self.checkpoint.save_interval or self.eval.task:
            raise ValueError(
                "--model.weights random without --model.checkpoint has no tokenizer: give --data.synthetic, "
                "--checkpoint.save-interval 0 and no --eval.task, or a checkpoint for its tokenizer"
            )

    def _check_vision_ahead(self) -> None:
        if not self.model.vision_ahead:
            return
        stages = [stage.freeze for stage in self.train.stages] or [self.model.freeze]
        if not any(VISION_MODEL in freeze for freeze in stages):
            raise ValueError("--model.vision-ahead is for a frozen vision tower: give --model.freeze vision_model too")
        if self.model.fp8_vision or self.parallel.pipeline_model_parallel_size > 1:
            other = "--model.fp8-vision" if self.model.fp8_vision else "--parallel.pipeline-model-parallel-size"
            raise ValueError(f"--model.vision-ahead does not go with {other}: leave out one of them")

    def _check_language_graphs(self) -> None:
        """Nothing waits for other ranks in the midst of a graph, nor is anything brought there or computed again."""
        if not self.model.language_graphs:
            return
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        others = [f"--parallel.{name.replace('_', '-')}" for name in sizes if getattr(self.parallel, name) > 1]
        others += ["--parallel.overlap-param-gather"] if self.parallel.overlap_param_gather else []
        others += ["--model.recompute"] if self.model.recompute != "none" else []
        if others:
            raise ValueError(f"--model.language-graphs does not go with {', '.join(others)}: leave out one of them")

    def _check_fp8(self) -> None:
        """What the layers' other half is in, and who computes it."""
        if self.model.fp8 == "none":
            if self.model.fp8_vision:
                raise ValueError("--model.fp8-vision without --model.fp8: give it delayed or tensorwise")
            return
        if self.train.precision != "bf16" or self.model.backend == "local":
            raise ValueError(
                f"--model.fp8 {self.model.fp8} is for --train.precision bf16 and Transformer Engine's layers, but "
                f"they are {self.train.precision} and --model.backend {self.model.backend}: give bf16 and auto"
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
