"""What a task asks, as the model takes it, and what the model answers, as text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmcore.data.conversation import encode_conversation, encode_prompt
from mmcore.data.pictures import Pictures
from mmcore.data.templates import Turn, find_template
from mmcore.data.tokenizer import Tokenizer
from mmcore.evaluation.task import Example
from mmcore.inference import generator
from mmcore.inference.engine import Prompt
from mmcore.models.architecture import Architecture
from mmcore.models.llava import LlavaModel


def layout(example: Example, tokenizer: Tokenizer, architecture: Architecture, *, has_pixels: bool = True) -> Prompt:
    """Tokens and pixels of one example.

    Args:
        has_pixels: whether the picture is decoded, which the first pipeline stage alone needs.
    Raises:
        ValueError: the picture is missing or broken.
    """
    pictures = Pictures(**architecture.picture_options())
    # Of a picture that is one square nothing more is known than that it is there.
    is_read = has_pixels or pictures.tiling != "none"
    try:
        files = [_content(image) if is_read else b"" for image in example.images]
        ids = [pictures.ids(data, tokenizer) for data in files]
        encoded = pictures.encode(files) if has_pixels else None
    except (OSError, ValueError) as error:
        names = ", ".join(str(image) for image in example.images if isinstance(image, Path))
        raise ValueError(f"picture {names} of example {example.id}: {error}") from None
    tokens = encode_prompt(
        example.prompt,
        tokenizer,
        architecture.conversation,
        pictures=ids,
        image_token_id=pictures.image_token_id,
    )
    if encoded is None:
        return Prompt(tokens=tokens, images=torch.empty(0, 3, 0, 0, dtype=torch.uint8))
    return Prompt(tokens=tokens, images=encoded.images, image_sources=encoded.sources)


def choice_tokens(choice: str, tokenizer: Tokenizer, architecture: Architecture) -> list[int]:
    """Tokens that the answer `choice` adds to any prompt, but for the one that ends it.

    Raises:
        ValueError: it has none.
    """
    pictures = Pictures(**architecture.picture_options())
    turns = [Turn("user", "?"), Turn("assistant", choice)]
    found = encode_conversation(
        turns, tokenizer, architecture.conversation, pictures=[], image_token_id=pictures.image_token_id
    )
    *tokens, _ = [label for label, is_trained in zip(found.labels, found.is_trained, strict=True) if is_trained]
    if not tokens:
        raise ValueError(f"the choice {choice!r} has no tokens")
    return tokens


def end_ids(tokenizer: Tokenizer, conversation: str) -> tuple[int, ...]:
    """Tokens that end an answer: the template's, and that of any text."""
    return tuple({find_template(conversation).end_id(tokenizer): None, tokenizer.eos_id: None})


def answer_texts(
    model: LlavaModel, prompts: Sequence[Prompt | None], tokenizer: Tokenizer, conversation: str, **options: Any
) -> list[str]:
    """Let the model answer; all ranks call it.

    Args:
        conversation: template, which knows what ends an answer.
        options: the other arguments of `generator.generate`, as are the prompts.
    Returns:
        One text for every prompt, in order, on every rank.
    """
    tokens = generator.generate(model, prompts, end_ids=end_ids(tokenizer, conversation), **options)
    return [tokenizer.decode(row).strip() for row in tokens]


def _content(image: Path | bytes) -> bytes:
    return image.read_bytes() if isinstance(image, Path) else image
