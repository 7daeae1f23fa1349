"""MMMU's reading of answers: the option that a response names, and what an open response comes to.

Source of the rules: MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py at commit bb0b95a. What they do is kept where it is
odd too: " A " is the option A though it is an article, and an answer of one number is right wherever the response has
that number in its last words. Megatron-LM's copy (examples/multimodal/evaluation, evaluate_mmmu.py and mmmu_utils.py
at commit d98e8a6) also takes "A)", and what stands in \\answer{} or \\boxed{}.
"""

import re
from collections.abc import Mapping, Sequence

_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.2, .5
)
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MARKS = {":", ",", ".", "!", "?", ";", "'"}
_MEGATRON = (re.compile(r"\\answer\{(.*?)\}"), re.compile(r"\\boxed\{(.*?)\}"))


def parse_choice(response: str, choices: Mapping[str, str | None]) -> str | None:
    """The letter of the option that a response names, the last one of several; None if it names none.

    Args:
        choices: text of each option by its letter, in order; None where it is not known, which then is not looked for.
    """
    padded = _padded(response)
    for form in ("({})", " {} "):
        if found := [letter for letter in choices if form.format(letter) in padded]:
            return max(found, key=lambda letter: padded.rfind(form.format(letter)))
    return _by_text(padded, choices)


def parse_choice_like_megatron(response: str, choices: Mapping[str, str | None]) -> str | None:
    """The same as Megatron-LM reads it: of several letters the last "(A)", or else the first "A)"."""
    inside = next((match[1] for pattern in _MEGATRON if (match := pattern.search(response))), None)
    padded = _padded(response.replace("Answer:", "Answer: ") if inside is None else inside)
    if found := [letter for letter in choices if f"{letter})" in padded]:
        return max(found, key=lambda letter: padded.rfind(f"({letter})"))
    if found := [letter for letter in choices if f" {letter} " in padded]:
        return max(found, key=lambda letter: padded.rfind(f" {letter} "))
    return _by_text(padded, choices)


def _padded(response: str) -> str:
    for mark in ",.!?;:'":  # once each, in this order
        response = response.strip(mark)
    return f" {response} "


def _by_text(padded: str, choices: Mapping[str, str | None]) -> str | None:
    """The option whose text a response of more than five words holds."""
    if len(padded.split()) <= 5:
        return None
    lowered = padded.lower()
    texts = {letter: text.lower() for letter, text in choices.items() if text is not None}
    found = [letter for letter, text in texts.items() if text in lowered]
    return max(found, key=lambda letter: lowered.rfind(texts[letter])) if found else None


def parse_open(response: str) -> list[str | float]:
    """What an open response can be taken to answer: its last words line by line, and all numbers in them."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    tails = [_tail(line, (*_KEYS, "=") if number == len(lines) else _KEYS) for number, line in enumerate(lines, 1)]
    parts = [tail for tail in tails if tail and tail not in _MARKS] or [response]
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return list(dict.fromkeys(value for part in (*parts, *numbers) for value in _normalised(part)))


def _tail(line: str, keys: Sequence[str]) -> str:
    """The shortest of what follows each of the keys; "" if none is there."""
    tail = ""
    for key in keys:
        if key in line:
            found = line.split(key)[-1].strip()
            # An empty one gives way to any later one: the official rule takes it for none.
            if not tail or len(found) < len(tail):
                tail = found
    return tail


def is_right(parsed: Sequence[str | float], answers: Sequence[str]) -> bool:
    """Whether an open response holds one of the right answers: as the same number, or as text within its text."""
    right = [value for answer in answers for value in _normalised(answer)]
    return any(
        any(isinstance(text, str) and text in value for text in right) if isinstance(value, str) else value in right
        for value in parsed
    )


def _normalised(text: str) -> list[str | float]:
    """A number to two digits, or text in lower case; of one letter only where a word starts or ends with it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
