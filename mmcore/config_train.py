"""How a run trains: the sections `train` and `optimizer`. Taken from mmcore.config, as all sections are."""

from dataclasses import dataclass
from typing import Literal

from mmcore.checks import check_patterns, positive
from mmcore.constants import MODULES


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
        if not 0 <= self.lr < float("inf"):
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
    replica_check_interval: int = 500
    """Steps between looks at whether the replicas still have the same weights and compute the same gradient, and one
    before each checkpoint; it takes as long as a micro batch. 0 for none."""
    watchdog_minutes: float = 5.0
    """A run in which nothing goes on for so long ends, and says which rank, sample, module and collective hangs; 0
    waits. Give less than --parallel.distributed-timeout-minutes, which ends it without a word about that."""
    val_interval: int = 0
    """Steps between losses on the dataset's val split, and one after the last step; 0 for none."""
    val_batches: int = 10
    """Global batches of such a loss, the same ones each time."""

    def __post_init__(self) -> None:
        positive("train", self, "max_bad_steps", "steps", "global_batch_size", "micro_batch_size", "val_batches")
        self._check_rampup()
        for name in ("val_interval", "watchdog_minutes", "replica_check_interval"):
            if not getattr(self, name) >= 0:
                option = f"--train.{name.replace('_', '-')}"
                raise ValueError(f"{option} must not be negative, but is {getattr(self, name)}")
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
        positive("optimizer", self, "lr", "adam_eps")
        for name, limit in (("weight_decay", "inf"), ("clip_grad", "inf"), ("adam_beta1", "1"), ("adam_beta2", "1")):
            if not 0 <= (value := getattr(self, name)) < float(limit):
                option = f"--optimizer.{name.replace('_', '-')}"
                raise ValueError(f"{option} must be at least 0 and below {limit}, not {value}")
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
