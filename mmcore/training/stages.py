"""What trains the model, stage by stage: gradient buffers, optimizer and schedule of what is not frozen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore import checkpoint as ckpt
from mmcore.checkpoint_optimizer import optimizer_state, set_optimizer_state
from mmcore.config import RunConfig, StageConfig
from mmcore.models.llava import LlavaModel
from mmcore.training.freezing import (
    check_biases,
    check_names,
    check_stacks,
    freeze,
    trainable_names,
    unwrap,
)
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap


def stages(config: RunConfig) -> list[StageConfig]:
    """The run's stages with every number filled in; one where none are asked for."""
    given = config.train.stages or (StageConfig(freeze=config.model.freeze),)
    return [
        replace(stage, name=stage.name or str(number), until=end, lr=stage.lr or config.optimizer.lr)
        for number, (stage, end) in enumerate(zip(given, config.train.stage_ends(), strict=True), 1)
    ]


def stage_of(step: int, planned: list[StageConfig]) -> int:
    """Which stage a step, from 1, is part of; what lies beyond the last belongs to the last."""
    return next((index for index, stage in enumerate(planned) if step <= stage.until), len(planned) - 1)


class Training:
    """The model as the current stage trains it. All ranks call every method."""

    ddp: Any
    optimizer: Any
    scheduler: Any

    def __init__(self, config: RunConfig, model: LlavaModel) -> None:
        """Check what the run names.

        Raises:
            ValueError: a pattern names nothing in the model, or some layers of a stack.
        """
        self.config, self.model, self.stages = config, model, stages(config)
        names = trainable_names(model)
        check_names(names, "--optimizer.module-lr", config.optimizer.module_rates())
        for stage in self.stages:
            option = "train.stages: freeze" if config.train.stages else "--model.freeze"
            check_names(names, option, stage.freeze)
            check_stacks(names, option, stage.freeze)
            check_biases(names, option, stage.freeze)

    def start(self, folder: Path | None) -> None:
        """Begin with a checkpoint's weights alone, or with those that the model was built with."""
        self._enter(0)
        if folder is None:
            self._schedule(0)
            return
        ckpt.load_checkpoint(folder, self.ddp)
        self.optimizer.reload_model_params()  # the masters were copied from the weights before they were loaded
        self._schedule(0)

    def resume(self, folder: Path, *, is_verified: bool = False) -> dict[str, Any]:
        """Go on from, or back to, a checkpoint of this run.

        Returns:
            The content of its run.json.
        Raises:
            ValueError: it is damaged, or was written with other learning rates of modules or other frozen parts.
        """
        state = json.loads((folder / ckpt.RUN_FILE).read_text())
        self._check_rates(folder, state["config"]["optimizer"])
        self._check_freeze(folder, state["step"], state["config"])
        # A checkpoint that was written at a stage's last step holds that stage's optimizer.
        self._enter(stage_of(state["step"], self.stages))
        ckpt.load_checkpoint(folder, self.ddp, self.optimizer, is_verified=is_verified)
        self._schedule(state["step"])
        return state

    def advance(self, step: int) -> str:
        """Enter the stage of a step, from 1, where it is another one.

        What stays trained keeps its optimizer state; what thaws begins with none.

        Returns:
            What to tell of it, or "".
        """
        index = stage_of(step, self.stages)
        if index == self.index:
            return ""
        before = self.stages[self.index].freeze
        known = optimizer_state(self.optimizer)
        self._enter(index)
        set_optimizer_state(self.optimizer, known)
        self._schedule(step - 1)
        stage = self.stages[index]
        thaws = ", ".join(pattern for pattern in before if pattern not in stage.freeze) or "nothing"
        freezes = ", ".join(pattern for pattern in stage.freeze if pattern not in before) or "nothing"
        return f"stage {stage.name} from step {step}: thaws {thaws}; freezes {freezes}; lr {stage.lr:.2e}"

    def _enter(self, index: int) -> None:
        if hasattr(self, "ddp"):
            unwrap(self.ddp)
            del self.ddp, self.optimizer, self.scheduler  # their memory is wanted below
        self.index = index
        freeze(self.model, self.stages[index].freeze)
        self.ddp = wrap(self.model, self.config.parallel, self.config.optimizer.states)
        self.optimizer = build_optimizer(self.config.optimizer, self.ddp)

    def _schedule(self, done: int) -> None:
        """After a checkpoint's groups are loaded: the configuration's rates count."""
        stage, config = self.stages[self.index], self.config.optimizer
        start = self.stages[self.index - 1].until if self.index else 0
        scaled = replace(config, lr=stage.lr, min_lr=config.min_lr * (stage.lr / config.lr))
        self.scheduler = build_scheduler(scaled, self.optimizer, stage.until - start)
        self.scheduler.step(increment=done - start)

    def _check_freeze(self, folder: Path, step: int, written: dict[str, Any]) -> None:
        whole_run = [{"until": 0, "freeze": written["model"]["freeze"]}]
        planned = written["train"].get("stages") or whole_run
        before = next((stage["freeze"] for stage in planned if step <= (stage["until"] or step)), planned[-1]["freeze"])
        now = self.stages[stage_of(step, self.stages)].freeze
        if set(before) != set(now):
            raise ValueError(
                f"{folder} was written with {' '.join(before) or 'nothing'} frozen, and now it is to be "
                f"{' '.join(now) or 'nothing'}. Give the same; change it from a later step on by train.stages; or "
                "begin another run from its weights by --model.checkpoint"
            )

    def _check_rates(self, folder: Path, written: dict[str, Any]) -> None:
        """The optimizer's state is kept by group, and groups are told apart by what part of lr they learn at."""
        given, rates = self.config.optimizer, written.get("module_lr", [])
        if rates == list(given.module_lr) and (not rates or written["lr"] == given.lr):
            return
        raise ValueError(
            f"{folder} was written with --optimizer.lr {written.get('lr')} and --optimizer.module-lr "
            f"{' '.join(rates) or '(none)'}: a run cannot change them where modules have their own. Give the same, or "
            "begin another run from its weights by --model.checkpoint"
        )
