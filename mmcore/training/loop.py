"""The training loop, top to bottom."""

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mmcore import checkpoint as ckpt
from mmcore import distributed, host
from mmcore.config import RunConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.data.batch import Batch
from mmcore.data.loader import build_train_loader
from mmcore.data.pictures import Pictures
from mmcore.data.stream import Count
from mmcore.data.tokenizer import load_tokenizer
from mmcore.models.architecture import Architecture, checkpoints, newest
from mmcore.models.llava import LlavaModel, base_config
from mmcore.training.metrics import Metrics
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import train_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(config: RunConfig, architecture: Architecture) -> None:
    """Train until `config.train.steps`, going on from the run's newest checkpoint where there is one.

    Args:
        config: checked; the world size fits its layout.
        architecture: what `config.model` stands for.
    Raises:
        ValueError: checkpoint, tokenizer, data or state do not fit the run.
        FloatingPointError: the gradient is not finite.
    """
    run = Path(config.checkpoint.save)
    distributed.initialize(config.parallel, config.train.seed)
    architecture = replace(architecture, conversation=config.data.conversation or architecture.conversation)
    dtype = DTYPES[config.train.precision]
    model = LlavaModel(architecture, config.model.backend, **base_config(config.parallel, dtype))
    model.to(host.device(), dtype)  # mcore builds the patch and position embeddings on the CPU, in fp32
    model.freeze(config.model.freeze)
    ddp = wrap(model)
    optimizer = build_optimizer(config.optimizer, ddp)
    scheduler = build_scheduler(config.optimizer, optimizer, config.train.steps)

    resumed = checkpoints(run)[-1:]
    source = resumed[0] if resumed else newest(Path(config.model.checkpoint))
    state = ckpt.load_checkpoint(source, ddp, optimizer if resumed else None)
    state = state if resumed else {"step": 0, "consumed_samples": 0, "consumed_tokens": 0}
    if not resumed:
        optimizer.reload_model_params()  # the masters were copied from the weights before they were loaded
    scheduler.step(increment=state["step"])
    batches = Batches(config, architecture, source, resumed=bool(resumed))
    metrics = Metrics(config, state["step"]) if distributed.is_main() else None
    if metrics:
        metrics.say(f"{'going on from' if resumed else 'starting from'} {source}")

    step = int(state["step"])
    num_microbatches = config.train.num_microbatches(distributed.data_parallel_size())
    while step < config.train.steps:
        lr = scheduler.get_lr(optimizer.param_groups[0]) if optimizer.param_groups else 0.0
        # All of a step's batches are dealt out first: under pipeline parallelism a stage that waits for
        # the one before it cannot take part in handing out a batch.
        dealt = [next(batches) for _ in range(num_microbatches)]
        result = train_step(ddp, optimizer, scheduler, dealt)
        step += 1
        state["consumed_samples"] += result.total.num_samples
        state["consumed_tokens"] += result.total.num_tokens
        if metrics:
            metrics.report(step, result, lr, batches)
        if step % config.checkpoint.save_interval == 0 or step == config.train.steps:
            saved = ckpt.save_checkpoint(
                run,
                step,
                model=ddp,
                optimizer=optimizer,
                architecture=architecture,
                tokenizer=source / TOKENIZER_DIR,
                state={**state, "data_parallel_size": distributed.data_parallel_size(), "config": asdict(config)},
                loader_state=batches.state(),
                keep_last=config.checkpoint.keep_last,
            )
            source = saved
            if metrics:
                metrics.say(f"saved {saved}")
    if metrics:
        metrics.close()
    distributed.shutdown()


class Batches(Iterator[Batch]):
    """Micro batches of this rank's replica: its data source reads them, the others receive them."""

    def __init__(self, config: RunConfig, architecture: Architecture, source: Path, *, resumed: bool) -> None:
        self.loader: Any = None
        self.waited = 0.0
        if not distributed.is_data_source():
            return
        self.loader = build_train_loader(
            config.data,
            tokenizer=load_tokenizer(source / TOKENIZER_DIR),
            conversation=architecture.conversation,
            pictures=Pictures(**architecture.picture_options()),
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=distributed.data_parallel_rank(),
            data_parallel_size=distributed.data_parallel_size(),
            seed=config.train.seed,
            states=ckpt.loader_states(source) if resumed else (),
        )
        self.iterator = iter(self.loader)

    def __next__(self) -> Batch:
        started = time.monotonic()
        batch = next(self.iterator) if self.loader else None
        self.waited += time.monotonic() - started
        return distributed.broadcast_in_replica(batch)

    def counts(self) -> dict[str, Count]:
        """Of each source, what this rank's loader has read so far."""
        return self.loader.counts() if self.loader else {}

    def state(self) -> bytes | None:
        return self.loader.state_dict() if self.loader else None
