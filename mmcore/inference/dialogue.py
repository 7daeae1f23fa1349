"""Conversations as the model takes them, and answers as people read them while they are written."""

from collections.abc import Sequence

from mmcore.data.conversation import encode_turns
from mmcore.data.image import picture_size
from mmcore.data.pictures import Pictures
from mmcore.data.templates import Turn
from mmcore.data.tokenizer import Tokenizer
from mmcore.inference.engine import Prompt
from mmcore.models.architecture import Architecture


class TooLongError(ValueError):
    """A conversation leaves no room for an answer."""


def lay_out(
    turns: Sequence[Turn], files: Sequence[bytes], tokenizer: Tokenizer, architecture: Architecture, max_length: int
) -> Prompt:
    """Tokens and pixels of a conversation that ends with a question.

    Nothing is decoded before the conversation is known to fit.

    Args:
        files: contents of the pictures' files, in the order of their tags.
        max_length: longest sequence in tokens, the answer's first included.
    Raises:
        TooLongError: it does not fit.
        ValueError: a picture is broken or too large, or see `encode_turns`.
    """
    pictures = Pictures(**architecture.picture_options())
    ids = []
    for number, data in enumerate(files, 1):
        try:
            picture_size(data)  # reads the header, which not every `ids` does
            ids.append(pictures.ids(data, tokenizer))
        except ValueError as error:
            raise ValueError(f"picture {number}: {error}") from None
    tokens = encode_turns(
        turns, tokenizer, architecture.conversation, pictures=ids, image_token_id=pictures.image_token_id
    )
    if len(tokens) >= max_length:
        raise TooLongError(
            f"the conversation has {len(tokens)} tokens, pictures included; {max_length - 1} leave room for an answer"
        )
    encoded = pictures.encode(files)
    return Prompt(tokens=tokens, images=encoded.images, image_sources=encoded.sources)


class Stripped:
    """Cuts the space around a text that comes in pieces: together they are the text that `str.strip` leaves."""

    def __init__(self) -> None:
        self.held = ""
        self.has_begun = False

    def __call__(self, piece: str) -> str:
        """What can be shown now; space is held back until something follows it."""
        text = self.held + piece
        if not self.has_begun:
            text = text.lstrip()
        shown = text.rstrip()
        self.held = text[len(shown) :]
        self.has_begun = self.has_begun or bool(shown)
        return shown
