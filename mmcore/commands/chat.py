"""`mmcore chat --checkpoint DIR [--image FILE]`: talk with a checkpoint, about pictures too."""

import os
import secrets
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mmcore.constants import EXIT_DONE
from mmcore.inference.loading import ModelConfig, Source, check, loaded
from mmcore.inference.sampling import Sampling
from mmcore.models.parameters import num_parameters

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig(ModelConfig):
    """Talk with a checkpoint in the terminal; /help there lists what can be done.

    Lines from a pipe are questions and commands alike, of which only answers are written.
    """

    image: tuple[Path, ...] = ()
    """Pictures to show with the first question."""
    system: str = ""
    """Text that opens the conversation; what the template has if empty."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the most probable token always, 1 draws them as the model rates them."""
    top_p: float = 1.0
    """Draw only from the most probable tokens that together have this much."""
    top_k: int = 0
    """Draw only from so many of the most probable tokens; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: what has been said becomes less probable."""
    seed: int | None = None
    """Of what is drawn; by default it is another one for each answer."""

    def __post_init__(self) -> None:
        super(ChatConfig, self).__post_init__()  # by its names: slots=True makes another class of this one
        if self.max_new_tokens <= 0:
            raise ValueError(f"--max-new-tokens must be above 0, not {self.max_new_tokens}")
        assert self.sampling

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
        )


def main(argv: list[str]) -> int:
    config = tyro.cli(ChatConfig, prog="mmcore chat", args=argv)
    source = check(config)
    if missing := [path for path in config.image if not path.is_file()]:
        raise ValueError(f"--image {missing[0]} is no file")
    if int(os.environ.get("RANK", 0)) == 0:
        lead(config, source)
    else:
        follow(config, source)
    return EXIT_DONE


def lead(config: ChatConfig, source: Source) -> None:
    """The main rank, which has the user."""
    from rich.console import Console

    from mmcore.inference.terminal import Chat, Manner, converse

    manner = Manner(
        sampling=config.sampling,
        seed=lambda: secrets.randbits(63) if config.seed is None else config.seed,
        max_new_tokens=config.max_new_tokens,
        system=config.system,
    )
    is_plain = not (sys.stdin.isatty() and sys.stdout.isatty())
    console = Console()
    if not is_plain:
        console.print(f"loading {source.folder} ...", style="dim", markup=False, highlight=False)
    with loaded(config, source, max_batch_size=1) as model:
        chat = Chat(model, source, manner, console, is_plain=is_plain)
        if not is_plain:
            greet(console, source)
        if config.image:
            chat.add_images(config.image)
        converse(chat)


def greet(console: "Console", source: Source) -> None:
    """Say who is there."""
    from rich.panel import Panel

    architecture, parallel = source.architecture, source.parallel
    size = sum(num_parameters(architecture).values())
    ranks = f", TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}"
    lines = [
        f"[bold]{source.folder.parent.name}/{source.folder.name}[/bold]",
        f"{size / 1e6:,.1f} million parameters{ranks}, {architecture.conversation}, {source.max_length} tokens",
        "[dim]/image FILE shows a picture, /help tells the rest, Ctrl-D ends[/dim]",
    ]
    if architecture.conversation == "plain":
        lines.append("[yellow]It sees pictures and continues: the template plain leaves out what you type[/yellow]")
    console.print(Panel.fit("\n".join(lines)))


def follow(config: ChatConfig, source: Source) -> None:
    """Another rank: works with the main one, which alone is told when to end."""
    with loaded(config, source, max_batch_size=1) as model:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        model.standby.follow()
