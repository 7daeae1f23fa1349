"""An answer's text while it is made: what is final of it, up to a stop string."""

from collections.abc import Callable, Sequence

# What an unfinished character is decoded as.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of tokens that come one by one; no character is told by halves, and nothing of a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        """
        Args:
            decode: text of tokens, as `Tokenizer.decode`.
            stop: texts that end the answer; they are not part of it.
        """
        self.decode, self.stop = decode, tuple(stop)
        self.ids: list[int] = []
        # Text is what a few tokens add to those before them: decoded alone, a word would lose its space.
        self.before, self.done = 0, 0
        self.held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token.

        Returns:
            What text became final by it.
        """
        self.ids.append(token)
        known = self.decode(self.ids[self.before : self.done])
        text = self.decode(self.ids[self.before :])
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self.before, self.done = self.done, len(self.ids)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """The rest, unfinished characters included; the answer ends here."""
        if self.stopped:
            return ""
        known = self.decode(self.ids[self.before : self.done])
        text = self._release(self.decode(self.ids[self.before :])[len(known) :])
        self.before = self.done = len(self.ids)
        rest, self.held = self.held, ""
        return text + ("" if self.stopped else rest)

    def _release(self, text: str) -> str:
        """What of held and new text is no part of a stop string."""
        text = self.held + text
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Longest end of the text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
