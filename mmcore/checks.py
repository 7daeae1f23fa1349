"""What options and their values are checked for alike. Imports no torch."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from mmcore.constants import MODULES


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" or nothing."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {close[0]!r}?" if close else ""


def positive(section: str, owner: Any, *names: str) -> None:
    """Raise a ValueError for the first of the named fields that is no number above zero."""
    for name in names:
        if not 0 < getattr(owner, name) < float("inf"):
            raise ValueError(f"--{section}.{name.replace('_', '-')} must be above 0, not {getattr(owner, name)}")


def check_patterns(option: str, patterns: Iterable[str]) -> None:
    """Raise a ValueError for the first pattern that cannot name a module or parameter of the model."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{option} {pattern!r} is not a regular expression: {error}") from None
        head = re.match(r"(\w+)(?:\\\.|\.\w|$)", pattern)  # what stands before the first dot, where it is a plain name
        if head and head[1] not in MODULES:
            raise ValueError(
                f"{option} {pattern!r} begins with {head[1]!r}, which is no part of the model"
                f"{nearest(head[1], MODULES)}; the parts are {', '.join(MODULES)}"
            )
