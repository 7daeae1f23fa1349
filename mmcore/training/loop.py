"""The training loop, top to bottom."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mmcore import checkpoint as ckpt
from mmcore import distributed, host
from mmcore.checkpoint_files import never_trained
from mmcore.config import RunConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.data.batch import Batch
from mmcore.data.loader import build_loader
from mmcore.data.pictures import Pictures
from mmcore.data.stream import Count
from mmcore.data.tokenizer import load_tokenizer
from mmcore.models.architecture import Architecture, newest
from mmcore.models.interleaved import build_model
from mmcore.models.llava import base_config
from mmcore.models.pipeline import plan_layers, stage_layers
from mmcore.training.memory import training_bytes
from mmcore.training.metrics import Metrics, Validation
from mmcore.training.optimizer import gather_parameters
from mmcore.training.policy import BadSteps
from mmcore.training.scoring import Scoring, best_steps
from mmcore.training.stages import Training, stages
from mmcore.training.starts import trainable_sizes, write_start
from mmcore.training.step import forward_backward, train_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(config: RunConfig, architecture: Architecture) -> None:
    """Train until `config.train.steps`, going on from the run's newest checkpoint where there is one.

    Args:
        config: checked; the world size fits its layout.
        architecture: what `config.model` stands for.
    Raises:
        ValueError: checkpoint, tokenizer, data or state do not fit the run.
        BadStepError: a step was bad, and the run is not to go on.
        SaveError: a checkpoint could not be written.
    """
    run = Path(config.checkpoint.save)
    distributed.initialize(config.parallel, config.train.seed)
    architecture = replace(architecture, conversation=config.data.conversation or architecture.conversation)
    dtype = DTYPES[config.train.precision]
    frozen = set.intersection(*(set(stage.freeze) for stage in stages(config)))
    layers = plan_layers(architecture, config.parallel, frozen)
    base = base_config(config.parallel, dtype, config.model.recompute)
    model = build_model(architecture, config.model.backend, layers, **base)
    model.to(host.device(), dtype)  # mcore builds the patch and position embeddings on the CPU, in fp32
    sizes = trainable_sizes(model)
    training = Training(config, model)

    resumed, passed_over = ckpt.newest_whole(run)
    if distributed.is_main():
        print(*passed_over, sep="\n", end="\n" if passed_over else "", file=sys.stderr, flush=True)
    source = resumed or newest(Path(config.model.checkpoint))
    if resumed:
        state = training.resume(resumed, is_verified=True)
    else:
        training.start(source)
        state = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0}
    bad_steps = BadSteps(config.train, state.get("grad_norms", ()))
    batches = Batches(config, architecture, source, resumed=bool(resumed))
    if config.train.val_interval:  # what its data lacks is said now, not after hours
        Batches(config, architecture, source, split="val").close()
    metrics = Metrics(config, state["step"]) if distributed.is_main() else None
    if metrics:
        write_start(metrics.first_step, config, architecture, sizes)
        metrics.say(f"{'going on from' if resumed else 'starting from'} {source}")
        needed = training_bytes(
            architecture,
            never_trained(stage.freeze for stage in stages(config)),
            config.parallel,
            data_parallel_size=distributed.data_parallel_size() * config.parallel.context_parallel_size,
            layers=stage_layers(layers, config.parallel.pipeline_model_parallel_size),
            precision=config.train.precision,
            states=config.optimizer.states,
        )
        metrics.say(f"memory of a rank before activations: {max(needed, key=lambda one: one.total)}")

    step = int(state["step"])
    scoring = Scoring(config, architecture, source, model, metrics) if config.eval.task else None
    if scoring and resumed:
        scoring.catch_up(step, training.ddp)
    saving: ckpt.Saving | None = None
    while step < config.train.steps:
        said = training.advance(step + 1)
        if said and metrics:
            metrics.say(said)
        lr = training.scheduler.get_lr({})  # of what has no rate of its own
        # All of a step's batches are dealt out first: under pipeline parallelism a stage that waits for
        # the one before it cannot take part in handing out a batch.
        rows = config.train.batch_size(step + 1)
        num_microbatches = config.train.num_microbatches(distributed.data_parallel_size(), rows)
        dealt = [next(batches) for _ in range(num_microbatches)]
        result = train_step(training.ddp, training.optimizer, training.scheduler, dealt, bad_steps.fault)
        step += 1
        state["consumed_samples"] += result.total.num_samples
        state["consumed_tokens"] += result.total.num_tokens
        if metrics:
            metrics.report(step, result, lr, batches)
        if result.fault:
            if saving:
                resumed = source = saving.finish()
                saving = None
                bad_steps.saved()
            answer = bad_steps.answer(step, result.fault, resumed)
            if metrics:
                metrics.say(f"step {step} is bad: {result.fault}; {answer}")
            if answer == "rewind" and resumed:
                if scoring:
                    scoring.finish()  # told now, so that it is forgotten with its step
                state = training.resume(resumed)
                step = int(state["step"])
                if metrics:
                    metrics.rewind(step, result.fault)
                continue
        if config.train.val_interval and (step % config.train.val_interval == 0 or step == config.train.steps):
            loss = validation_loss(training.ddp, config, architecture, source)
            if metrics:
                metrics.report_validation(step, *loss)
        if scoring:
            scoring.tell()
            if scoring.is_due(step):
                scoring.evaluate(step, training.ddp)
        is_last = step == config.train.steps
        if step % config.checkpoint.save_interval == 0 or is_last:
            if saving:
                resumed = source = saving.finish()
                bad_steps.saved()
            state["grad_norms"] = list(bad_steps.norms) if config.train.spike_factor else []
            gather_parameters(training.ddp)
            saving = ckpt.Saving(
                config.checkpoint,
                step,
                model=training.ddp,
                optimizer=training.optimizer,
                architecture=architecture,
                tokenizer=source / TOKENIZER_DIR,
                state={**state, "data_parallel_size": distributed.data_parallel_size(), "config": asdict(config)},
                loader_state=batches.state(),
                best=best_steps(config) if metrics and config.checkpoint.keep_best else (),
            )
        if saving and (is_last or not config.checkpoint.async_save or saving.is_written()):
            resumed = source = saving.finish()
            saving = None
            bad_steps.saved()
            if metrics:
                metrics.say(f"saved {source}")
    if scoring:
        scoring.finish()
    if metrics:
        metrics.close()
    distributed.shutdown()


def validation_loss(model: Any, config: RunConfig, architecture: Architecture, source: Path) -> Validation:
    """Loss on the val split: always of the same samples, rows and batches."""
    batches = Batches(config, architecture, source, split="val")
    num_microbatches = config.train.num_microbatches(distributed.data_parallel_size())
    model.eval()
    dealt = [next(batches) for _ in range(config.train.val_batches * num_microbatches)]
    total, shares = forward_backward(model, dealt, forward_only=True)
    model.train()
    batches.close()
    return total, dict(zip(batches.sources, shares, strict=False))


class Batches(Iterator[Batch]):
    """Micro batches of this rank's replica: its data source reads them, the others receive them."""

    def __init__(
        self,
        config: RunConfig,
        architecture: Architecture,
        source: Path,
        *,
        resumed: bool = False,
        split: str = "train",
    ) -> None:
        self.loader: Any = None
        self.waited = 0.0
        if not distributed.is_data_source():
            return
        self.loader = build_loader(
            config.data if split == "train" else replace(config.data, shuffle_buffer_size=0),
            tokenizer=load_tokenizer(source / TOKENIZER_DIR),
            conversation=architecture.conversation,
            pictures=Pictures(**architecture.picture_options()),
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=distributed.data_parallel_rank(),
            data_parallel_size=distributed.data_parallel_size(),
            seed=config.train.seed,
            states=ckpt.loader_states(source) if resumed else (),
            split=split,
            loss_weighting=config.train.loss_weighting,
        )
        self.iterator = iter(self.loader)

    def __next__(self) -> Batch:
        started = time.monotonic()
        batch = next(self.iterator) if self.loader else None
        self.waited += time.monotonic() - started
        return distributed.broadcast_in_replica(batch, first_stage_only=("images",))

    def counts(self) -> dict[str, Count]:
        """Of each source, what this rank's loader has read so far."""
        return self.loader.counts() if self.loader else {}

    @property
    def sources(self) -> tuple[str, ...]:
        """Names, where data is read."""
        return self.loader.sources if self.loader else ()

    def close(self) -> None:
        if self.loader:
            self.loader.close()

    def state(self) -> bytes | None:
        return self.loader.state_dict() if self.loader else None
