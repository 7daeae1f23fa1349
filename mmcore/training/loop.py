"""The training loop, top to bottom."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmcore import checkpoint as ckpt
from mmcore import distributed, host
from mmcore.checkpoint_files import never_trained
from mmcore.config import RunConfig
from mmcore.constants import DONE_FILE, EXIT_SICK, TOKENIZER_DIR
from mmcore.data.batch import Batch
from mmcore.models.architecture import Architecture, newest
from mmcore.models.interleaved import build_model
from mmcore.models.kernels import accumulate_in_place, check_kernels
from mmcore.models.llava import base_config
from mmcore.models.pipeline import plan_layers, stage_layers
from mmcore.training import marks, watchdog
from mmcore.training.batches import Batches
from mmcore.training.memory import training_bytes
from mmcore.training.metrics import Metrics, Validation, is_told
from mmcore.training.optimizer import gather_parameters
from mmcore.training.policy import BadStepError, BadSteps
from mmcore.training.prefetch import Prefetch
from mmcore.training.replicas import disagreement
from mmcore.training.scoring import Scoring, best_steps
from mmcore.training.signals import PreemptedError, heard
from mmcore.training.speed import Speed
from mmcore.training.stages import Training, stages
from mmcore.training.starts import trainable_sizes, write_start
from mmcore.training.step import forward_backward, train_step
from mmcore.training.suspect import Suspects, brief, gather_samples
from mmcore.training.timing import ModuleTimes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(config: RunConfig, architecture: Architecture) -> None:
    """Train until `config.train.steps`, going on from the run's newest checkpoint where there is one.

    Args:
        config: checked; the world size fits its layout.
        architecture: what `config.model` stands for.
    Raises:
        ValueError: checkpoint, tokenizer, data, state or this machine do not fit the run.
        BadStepError: a step was bad, and the run is not to go on.
        SaveError: a checkpoint could not be written.
        PreemptedError: the run was asked to end, and what it has done is in a checkpoint.
    """
    run = Path(config.checkpoint.save)
    check_kernels(config.model)
    distributed.initialize(config.parallel, config.train.seed)
    architecture = replace(architecture, conversation=config.data.conversation or architecture.conversation)
    dtype = DTYPES[config.train.precision]
    frozen = set.intersection(*(set(stage.freeze) for stage in stages(config)))
    layers = plan_layers(architecture, config.parallel, frozen)
    base = base_config(config.parallel, dtype, config.model.recompute, config.model.fp8)
    options = {"fp8_vision": config.model.fp8_vision, "language_graphs": config.model.language_graphs}
    model = build_model(architecture, config.model.backend, layers, **options, **base)
    accumulate_in_place(model)
    model.to(host.device(), dtype)  # mcore builds the patch and position embeddings on the CPU, in fp32
    sizes = trainable_sizes(model)
    training = Training(config, model)

    resumed, passed_over = ckpt.newest_whole(run)
    if distributed.is_main():
        print(*passed_over, sep="\n", end="\n" if passed_over else "", file=sys.stderr, flush=True)
    source = resumed or (newest(Path(config.model.checkpoint)) if config.model.checkpoint else None)
    if resumed:
        state = training.resume(resumed, is_verified=True)
    else:
        training.start(source if config.model.weights == "checkpoint" else None)
        state = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0}
    bad_steps, suspects = BadSteps(config.train, state.get("grad_norms", ())), Suspects(run)
    batches = Prefetch(Batches(config, architecture, source, resumed=bool(resumed)))
    metrics = speed = times = None
    if distributed.is_main():
        speed = Speed(config, architecture, dist.get_world_size(), sizes)
        metrics = Metrics(config, state["step"], speed)
        times = ModuleTimes(model) if config.logging.module_times else None
    if metrics:
        write_start(metrics.first_step, config, architecture, sizes)
        begun = source if config.model.weights == "checkpoint" else "random weights"
        metrics.say(f"going on from {source}" if resumed else f"starting from {begun}")
        needed = training_bytes(
            architecture,
            never_trained(stage.freeze for stage in stages(config)),
            config.parallel,
            data_parallel_size=distributed.data_parallel_size() * config.parallel.context_parallel_size,
            layers=stage_layers(layers, config.parallel.pipeline_model_parallel_size),
            precision=config.train.precision,
            states=config.optimizer.states,
            fp8=config.model.fp8_parts,
        )
        largest, copies = max(needed, key=lambda one: one.total), max(one.copies for one in needed)
        saves = f"; of its host at a save: {copies / 1e9:.3g} GB" if config.checkpoint.save_interval else ""
        metrics.say(f"memory of a rank before activations: {largest}{saves}")
        if state["step"] >= config.train.steps:
            metrics.say(f"nothing to do: {state['step']} steps are done, and --train.steps is {config.train.steps}")
        else:
            (run / DONE_FILE).unlink(missing_ok=True)

    first_step = step = int(state["step"])
    waited = 0.0
    scoring = Scoring(config, architecture, source, model, metrics) if config.eval.task and source else None
    saving: ckpt.Saving | None = None
    if config.train.watchdog_minutes:
        watchdog.start(run, config.train.watchdog_minutes, model)

    def mark(part: str) -> None:
        marks.mark(part)
        if times:
            times.mark(part)

    first_chunk: Any = next(iter(model.chunks))

    def beside(dealt: Sequence[Batch], ahead: int, done: int) -> None:
        if config.model.vision_ahead:
            for batch in dealt[done : done + 2]:
                first_chunk.see_ahead(batch.images)
        batches.keep_pace(ahead, len(dealt), done)

    is_asked = any(distributed.largest([bool(heard())]))
    if resumed and not is_asked:  # a run that is asked to end saves first
        has_validation = distributed.largest([bool(metrics and metrics.has_validation(step))])
        if is_validated(config, step) and not any(has_validation):
            validate(step, training, config, architecture, source, metrics)
        if scoring:
            scoring.catch_up(step, training.ddp)
    while step < config.train.steps and not is_asked:
        marks.at_step(step + 1)
        said = training.advance(step + 1)
        if said and metrics:
            metrics.say(said)
        lr = training.scheduler.get_lr({})  # of what has no rate of its own
        if times:
            times.seconds()  # what came between is no part of the step
            times.mark("data")
        # All of a step's batches are dealt out first: under pipeline parallelism a stage that waits for
        # the one before it cannot take part in handing out a batch.
        count = partial(config.train.num_microbatches, distributed.data_parallel_size())
        dealt = [next(batches) for _ in range(count(config.train.batch_size(step + 1)))]
        is_last = step + 1 == config.train.steps
        ahead = 0 if is_last else count(config.train.batch_size(step + 2))
        result = train_step(
            training.ddp,
            training.optimizer,
            training.scheduler,
            dealt,
            bad_steps.fault,
            partial(beside, dealt, ahead),
            mark,
            heard,
        )
        marks.mark("telling")
        step += 1
        is_asked = result.is_asked
        state["consumed_samples"] += result.total.num_samples
        state["consumed_tokens"] += result.total.num_tokens
        most = (0.0, 0.0)
        if is_told(config, first_step, step):
            held, data_wait = distributed.largest((host.peak_memory(), batches.waited - waited))
            most, waited = (held, data_wait), batches.waited
        if metrics:
            metrics.report(step, result, lr, batches, times.seconds() if times else None, most)
        if metrics and not result.fault and (said := suspects.pass_by(step)):
            metrics.say(said)
        if result.fault:
            samples, hosts = gather_samples(dealt, result.bad)
            if saving:
                resumed = source = saving.finish()
                saving = None
                bad_steps.saved()
            try:
                answer = bad_steps.answer(step, result.fault, resumed)
            except BadStepError as error:
                raise suspects.judge(step, error, samples, hosts) from None
            if metrics:
                metrics.say(f"step {step} is bad: {result.fault}; {answer}. Its samples: {brief(samples)}")
            if answer == "rewind" and resumed:
                if scoring:
                    scoring.finish()  # told now, so that it is forgotten with its step
                marks.mark("looking for a checkpoint")
                found, passed_over = ckpt.newest_whole(run)
                marks.mark("going back")
                assert found, f"{resumed} is gone, whole or damaged"
                resumed = source = found
                state = training.resume(resumed, is_verified=True)
                step = int(state["step"])
                if metrics:
                    metrics.rewind(step, result.fault)
                    for told in passed_over:
                        metrics.say(told)
                continue
        marks.mark("validation")
        if is_validated(config, step) and not is_asked:
            validate(step, training, config, architecture, source, metrics)
        marks.mark("scoring")
        if scoring:
            scoring.tell()
            if scoring.is_due(step) and not is_asked:
                scoring.evaluate(step, training.ddp)
        interval = config.checkpoint.save_interval
        is_saved = interval > 0 and (step % interval == 0 or is_last or is_asked)
        checked = config.train.replica_check_interval
        if checked and (step % checked == 0 or is_saved):
            marks.mark("comparing replicas")
            fault = disagreement(
                training.ddp,
                dealt[0],
                number=config.parallel.microbatch_multiple,
                has_history=config.model.fp8 == "delayed",
            )
            if metrics:
                metrics.leave_out()
            if fault:
                if saving:
                    resumed = saving.finish()
                kept = f"the newest checkpoint is {resumed}" if resumed else "there is no checkpoint of this run yet"
                raise BadStepError(
                    f"after step {step} {fault}. A machine computes wrongly: leave it out, and start the same command "
                    f"again. This was not saved, and {kept}",
                    EXIT_SICK,
                )
        marks.mark("saving")
        if is_saved:
            assert source is not None  # there is a tokenizer; see RunConfig.check
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
        if saving and (is_last or is_asked or not config.checkpoint.async_save or saving.is_written()):
            resumed = source = saving.finish()
            saving = None
            bad_steps.saved()
            if metrics:
                metrics.say(f"saved {source}")
                suspects.saved(step)
    if scoring and is_asked:
        scoring.abandon()
    elif scoring:
        scoring.finish()
        distributed.meet()
    watchdog.stop()
    if metrics:
        metrics.close()
    if speed and speed.rows:
        print(json.dumps(speed.summary()))
    distributed.shutdown()
    if is_asked:
        asked = heard() or "a signal to another rank"
        kept = f"{resumed} is the newest checkpoint" if resumed else "there is no checkpoint of this run yet"
        raise PreemptedError(f"ended after step {step}, as {asked} asked; {kept}. The same command goes on")


def is_validated(config: RunConfig, step: int) -> bool:
    """Whether a step is followed by a loss on the val split."""
    interval = config.train.val_interval
    return interval > 0 and (step % interval == 0 or step == config.train.steps)


def validate(
    step: int,
    training: Training,
    config: RunConfig,
    architecture: Architecture,
    source: Path | None,
    metrics: Metrics | None,
) -> None:
    """Take the loss on the val split after a step, and tell it."""
    loss = validation_loss(training.ddp, config, architecture, source)
    if metrics:
        metrics.report_validation(step, *loss)


def validation_loss(model: Any, config: RunConfig, architecture: Architecture, source: Path | None) -> Validation:
    """Loss on the val split: always of the same samples, rows and batches."""
    batches = Batches(config, architecture, source, split="val")
    num_microbatches = config.train.num_microbatches(distributed.data_parallel_size())
    model.eval()
    dealt = [next(batches) for _ in range(config.train.val_batches * num_microbatches)]
    total, shares = forward_backward(model, dealt, forward_only=True)
    model.train()
    batches.close()
    return total, dict(zip(batches.sources, shares, strict=False))
