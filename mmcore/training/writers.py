"""Who else is told a run's numbers: TensorBoard and Weights & Biases, behind one interface."""

import importlib.util
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from mmcore.config import LoggingConfig, RunConfig

WANDB_ID_FILE = "wandb_id"


class Writer(Protocol):
    """Keeps numbers by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keep them; what belongs together has the same part before or after a slash."""

    def close(self) -> None:
        """Let nothing be lost."""


def check_writers(config: LoggingConfig) -> None:
    """Say what is missing before anything is up; imports neither of the two.

    Raises:
        ValueError: W&B is asked for and not installed, or TensorBoard's folder cannot be made.
    """
    try:
        if config.tensorboard_dir and "://" not in config.tensorboard_dir:
            Path(config.tensorboard_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--logging.tensorboard-dir {config.tensorboard_dir} cannot be made: {error.strerror}; choose another "
            "folder, or leave the option out"
        ) from None
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--logging.wandb-project {config.wandb_project} needs wandb, which is not installed: `pip install wandb`, "
            "or leave the option out"
        )


def build_writers(config: RunConfig, first_step: int) -> list[Writer]:
    """Those that the run asks for.

    Args:
        first_step: steps that are done already.
    """
    writers: list[Writer] = []
    if config.logging.tensorboard_dir:
        writers.append(TensorBoard(Path(config.logging.tensorboard_dir), first_step))
    if config.logging.wandb_project:
        writers.append(WandB(config))
    return writers


class TensorBoard:
    """Event files in a folder; what a killed run wrote after the step that this one starts from is not shown."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps count from 1, and `purge_step` is the first that is not shown.
        self.writer: Any = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of a W&B project, the same one after a restart; `WANDB_MODE=offline` keeps it on this machine.

    Its own step can only rise, and a run may go back: the step is a number among the others, and their x axis.
    """

    def __init__(self, config: RunConfig) -> None:
        """Begin the run, or go on with it.

        Raises:
            ValueError: W&B refuses.
        """
        import wandb

        folder = Path(config.checkpoint.save)
        kept = folder / WANDB_ID_FILE
        if not kept.exists():
            kept.write_text(secrets.token_hex(4))
        try:
            self.run: Any = wandb.init(
                project=config.logging.wandb_project,
                name=config.logging.wandb_name or folder.name,
                id=kept.read_text(),
                resume="allow",
                dir=str(folder),
                config=asdict(config),
            )
        except wandb.Error as error:
            raise ValueError(
                f"--logging.wandb-project {config.logging.wandb_project}: W&B does not begin the run: {error}. "
                "`wandb login` lets it in, WANDB_MODE=offline keeps the run on the disk"
            ) from None
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()
