"""Which option a free answer to a multiple-choice question means, by rules alone: VLMEvalKit's, of MMBench.

Source: open-compass/VLMEvalKit, vlmeval/utils/matching_util.py (can_infer) at commit e8e78f0.
"""

import re
from collections.abc import Mapping

REFUSED = "Z"
"""The letter of an answer that declines to choose."""

_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# As it is: "the answer is a dog" is option A.
_VERBOSE = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_LAST_WORDS = 4


def infer_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer means: named by its letter, or else by its text.

    Args:
        choices: text of each option by its letter; one that is empty has no text to be found by.
    Returns:
        A letter, `REFUSED`, or None where the rules find nothing, or more than one.
    """
    return _by_letter(answer, choices) or _by_text(answer, choices)


def _by_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    """The one letter among its words, if it is one of the last four; or what follows "answer is"."""
    if _FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED
    words = answer.translate(_SEPARATORS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    verbose = _VERBOSE.search(answer)
    return verbose[1].upper() if verbose and verbose[1].upper() in choices else None


def _by_text(answer: str, choices: Mapping[str, str]) -> str | None:
    """The one option whose text stands in an answer that is at most twice as long as all options together."""
    if len(answer) > 2 * sum(map(len, choices.values())):
        return None
    found = [letter for letter, text in choices.items() if text and text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None
