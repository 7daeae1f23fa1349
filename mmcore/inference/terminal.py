"""A conversation with a model: in a terminal, or line by line through pipes."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from mmcore.checks import nearest
from mmcore.constants import IMAGE_TAG
from mmcore.data.conversation import with_tags
from mmcore.data.image import picture_size
from mmcore.data.pictures import Pictures
from mmcore.data.templates import Turn
from mmcore.evaluation.scores import write_whole
from mmcore.inference.dialogue import Stripped, TooLongError, lay_out
from mmcore.inference.engine import Prompt, Request
from mmcore.inference.keyboard import editing, interruptible, survived_by_launcher
from mmcore.inference.loading import Loaded, Source
from mmcore.inference.sampling import Sampling

# By name: what stands behind it, and what it does.
COMMANDS = {
    "image": ("FILE ...", f"show pictures with the next question: where it says {IMAGE_TAG}, else before it"),
    "reset": ("", "forget the conversation and begin anew"),
    "save": (
        "FILE",
        "keep it as text; FILE.jsonl gets one more line, for `mmcore prepare jsonl --images /`",
    ),
    "help": ("", "show this"),
    "exit": ("", "end, as Ctrl-D does"),
}

# As LLaVA's JSON names them.
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}

# What would steer a terminal, in an answer that is shown on one.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


class Picture(NamedTuple):
    path: Path
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How answers are made."""

    sampling: Sampling
    seed: Callable[[], int]
    """Of the next answer."""
    max_new_tokens: int
    system: str = ""
    """Text that opens the conversation; the template's own if empty."""


class Chat:
    """A conversation, and what a line of its user does to it."""

    def __init__(self, model: Loaded, source: Source, manner: Manner, console: Console, *, is_plain: bool) -> None:
        """
        Args:
            is_plain: whether answers alone are written, as they are: nobody looks on.
        """
        self.model, self.source, self.manner = model, source, manner
        self.console, self.is_plain = console, is_plain
        self.turns: list[Turn] = []
        self.shown: list[Picture] = []
        """Pictures of the turns."""
        self.pending: list[Picture] = []
        """Those of the next question."""
        self.saved: set[Path] = set()
        self.reset()

    def reset(self) -> None:
        self.turns = [Turn("system", self.manner.system)] if self.manner.system else []
        self.shown, self.pending = [], []

    def take(self, line: str) -> bool:
        """Answer a question, or obey a command.

        Returns:
            Whether the conversation goes on.
        Raises:
            ValueError: it cannot be done; all is as it was.
        """
        if not line.startswith("/"):
            if line.strip():
                self.ask(line.strip())
            return True
        name, _, rest = line[1:].strip().partition(" ")
        if name not in COMMANDS:
            known = nearest(f"/{name}", [f"/{name}" for name in COMMANDS])
            raise ValueError(f"/{name} is no command{known}; /help lists them")
        if rest and not COMMANDS[name][0]:
            raise ValueError(f"/{name} takes nothing behind it")
        if name == "image":
            self.add_images(_paths(rest.strip()))
        elif name == "save":
            self.save(rest.strip())
        elif name == "help":
            self.help()
        elif name == "reset":
            self.reset()
            self._note("begun anew")
        return name != "exit"

    def add_images(self, paths: Sequence[Path]) -> None:
        """Read pictures for the next question."""
        if not paths:
            raise ValueError("/image FILE: give a picture's file, or several")
        options = Pictures(**self.source.architecture.picture_options())
        pictures = [_read_picture(path, options) for path in paths]
        for picture in pictures:
            width, height = picture_size(picture.data)
            count = len(options.ids(picture.data, self.model.tokenizer))
            self._note(f"{picture.path.name}: {width} x {height} pixels, {count} tokens")
        self.pending += pictures

    def save(self, file: str) -> None:
        """Write the conversation."""
        if not file:
            raise ValueError("/save FILE: give a file")
        if not any(turn.role == "assistant" for turn in self.turns):
            raise ValueError("there is nothing to save yet")
        (path,) = _paths(file, at_most=1)
        if path.suffix == ".jsonl":
            line = (json.dumps(self.as_row(), ensure_ascii=False) + "\n").encode()
            before = path.read_bytes() if path.exists() else b""
            write_whole(path, before + line)
        elif path.exists() and path.resolve() not in self.saved:
            raise ValueError(f"{path} exists already: give another name")
        else:
            write_whole(path, self.as_text().encode())
            self.saved.add(path.resolve())
        self._note(f"saved in {path}")

    def as_row(self) -> dict[str, object]:
        """What `mmcore.data.sources.jsonl` reads, with pictures that lie in the folder `/`."""
        images = [picture.path.resolve().as_posix().lstrip("/") for picture in self.shown]
        turns = [{"from": NAMES[turn.role], "value": turn.text} for turn in self.turns]
        return {"images": images, "conversations": turns} if images else {"conversations": turns}

    def as_text(self) -> str:
        """For people, pictures by their paths."""
        paths = iter(self.shown)
        parts = []
        for turn in self.turns:
            text = turn.text
            while turn.role == "user" and IMAGE_TAG in text:
                text = text.replace(IMAGE_TAG, f"[{next(paths).path}]", 1)
            parts.append(f"## {turn.role}\n\n{text}\n")
        return "\n".join(parts)

    def help(self) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (behind, meaning) in COMMANDS.items():
            table.add_row(f"/{name} {behind}".strip(), meaning)
        table.add_row("Ctrl-C", "stop an answer")
        table.add_row("", "a question that begins with / takes a space before it")
        self.console.print(table, highlight=False)

    def ask(self, question: str) -> None:
        """Put a question with the pending pictures, and write the answer."""
        turns = [*self.turns, Turn("user", with_tags(question, len(self.pending)))]
        pictures = [*self.shown, *self.pending]
        files = [picture.data for picture in pictures]
        source = self.source
        try:
            prompt = lay_out(turns, files, self.model.tokenizer, source.architecture, source.max_length)
        except TooLongError as error:
            raise ValueError(f"{error}: /reset begins anew") from None
        text = self._answer(prompt)
        self.turns, self.shown, self.pending = [*turns, Turn("assistant", text)], pictures, []

    def _answer(self, prompt: Prompt) -> str:
        engine, room = self.model.engine, self.source.max_length - len(prompt.tokens)
        request = Request(
            prompt=prompt,
            sampling=replace(self.manner.sampling, seed=self.manner.seed()),
            max_new_tokens=min(self.manner.max_new_tokens, room),
            end_ids=self.model.end_ids,
        )
        stripped, text, count, reason, first = Stripped(), "", 0, "", 0.0
        watched = nullcontext(lambda: False) if self.is_plain else interruptible()
        with watched as is_stopped, self.model.standby.awake(), ExitStack() as waiting:
            if not self.is_plain:
                waiting.enter_context(self.console.status("", spinner="dots"))
            id = engine.add(request)
            while not engine.is_idle:
                for delta in engine.step():
                    first = first or time.monotonic()
                    count, reason = count + len(delta.tokens), delta.finish_reason
                    if piece := stripped(delta.text):
                        waiting.close()
                        self._write(piece)
                        text += piece
                if is_stopped():
                    engine.cancel(id)
        self._write("\n")
        how = {"length": ", cut there", "cancelled": ", stopped"}.get(reason, "")
        speed = f", {(count - 1) / (time.monotonic() - first):.0f} a second" if count > 1 else ""
        used = len(prompt.tokens) + count
        self._note(f"{count} tokens{how}{speed}; {used} of {self.source.max_length} in all")
        return text

    def _write(self, text: str) -> None:
        if self.is_plain:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            self.console.print(text.translate(_CONTROLS), end="", markup=False, highlight=False, soft_wrap=True)

    def _note(self, text: str) -> None:
        if not self.is_plain:
            self.console.print(text, style="dim", markup=False, highlight=False)


def _paths(text: str, at_most: int | None = None) -> list[Path]:
    """Files as a shell would take them; a name that is a file's as it stands is that file's."""
    if Path(text).is_file():
        return [Path(text)]
    try:
        names = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{text}: {error}, put the name in quotes") from None
    if at_most is not None and len(names) > at_most:
        raise ValueError(f"{text}: one name is taken, put it in quotes")
    return [Path(name).expanduser() for name in names]


def _read_picture(path: Path, options: Pictures) -> Picture:
    """A picture that can be decoded."""
    try:
        data = path.read_bytes()
        options.encode([data])
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Picture(path, data)


def converse(chat: Chat) -> None:
    """Let the user talk until the end of input or /exit.

    Raises:
        ValueError: a line of a pipe cannot be obeyed, so that those behind it would mean something else.
    """
    if chat.is_plain:
        for line in sys.stdin:
            if not chat.take(line.rstrip("\n")):
                break
        return
    with survived_by_launcher(), editing([*COMMANDS]):
        while True:
            try:
                if not chat.take(_read_line(len(chat.pending))):
                    break
            except EOFError:
                chat.console.print()
                break
            except KeyboardInterrupt:
                chat.console.print("\n/exit or Ctrl-D ends the conversation", style="dim", highlight=False)
            except ValueError as error:
                told = " ".join(str(error).split())
                chat.console.print(told, style="red", markup=False, highlight=False, soft_wrap=True)


def _read_line(num_pictures: int) -> str:
    """Ask for a line. What has no width is between \\1 and \\2, so that readline knows where the cursor is."""
    pictures = f"[{num_pictures} picture{'s' * (num_pictures > 1)}] " if num_pictures else ""
    return input(f"\n\1\33[1;36m\2{pictures}>\1\33[0m\2 ")
