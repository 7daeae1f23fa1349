"""What a user types: lines, with editing, history and completion; and Ctrl-C as a question in place of an end."""

import glob
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CTRL_C = b"\x03"
MAX_HISTORY = 1000


def history_file() -> Path:
    """Where lines are kept from one conversation to the next (XDG Base Directory Specification 0.8)."""
    folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(folder) / "mmcore" / "chat_history"


@contextmanager
def editing(commands: Sequence[str]) -> Iterator[None]:
    """While it lasts `input` edits lines, remembers them, and completes commands and names of files."""
    import readline

    path = history_file()
    found: list[str] = []

    def complete(text: str, number: int) -> str | None:
        if number == 0:
            line = readline.get_line_buffer()
            is_command = line.startswith("/") and " " not in line
            found[:] = [f"/{name} " for name in commands if f"/{name}".startswith(text)] if is_command else _files(text)
        return found[number] if number < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind('"\\C-c": kill-whole-line')  # which is a key where `survived_by_launcher` makes it one
    readline.set_history_length(MAX_HISTORY)
    with suppress(OSError):  # the first time there is none
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):  # a home that cannot be written is no reason to end badly
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def _files(text: str) -> list[str]:
    """Names that begin so, folders with a slash behind."""
    found = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
    return [f"{name}/" if os.path.isdir(name) else f"{name} " for name in found]


def is_launched() -> bool:
    """Whether torchrun started this process and waits in the same terminal, whose Ctrl-C would end all ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and sys.stdin.isatty()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While it lasts Ctrl-C ends nothing.

    Yields:
        Whether it has been pressed.
    """
    pressed = False

    def press(*_: Any) -> None:
        nonlocal pressed
        pressed = True

    def is_pressed() -> bool:
        if is_launched() and select.select([sys.stdin], [], [], 0)[0] and CTRL_C in os.read(sys.stdin.fileno(), 1024):
            press()
        return pressed

    before = signal.signal(signal.SIGINT, press)
    try:
        with _terminal(by_lines=False):
            yield is_pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def survived_by_launcher() -> Iterator[None]:
    """While it lasts Ctrl-C does not end torchrun: the terminal makes a key of it."""
    with _terminal(by_lines=True):
        yield


@contextmanager
def _terminal(*, by_lines: bool) -> Iterator[None]:
    """Under torchrun a terminal whose Ctrl-C is a key; if not by lines, one that gives keys at once and unseen."""
    if not is_launched():
        yield
        return
    import termios

    before, changed = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
    # Not by leaving out ISIG, the flag for all such keys, which readline puts back.
    changed[6][termios.VINTR] = bytes([os.fpathconf(sys.stdin.fileno(), "PC_VDISABLE")])
    if not by_lines:
        changed[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
