"""What a task asks, as the model takes it, and what the model answers, as text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmcore.data.conversation import encode_prompt
from mmcore.data.pictures import Pictures
from mmcore.data.templates import find_template
from mmcore.data.tokenizer import Tokenizer
from mmcore.evaluation.task import Example
from mmcore.inference import generator
from mmcore.inference.generator import Prompt
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
    try:
        files = [image.read_bytes() if isinstance(image, Path) else image for image in example.images]
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
    end_id = find_template(conversation).end_id(tokenizer)
    tokens = generator.generate(model, prompts, end_id=end_id, **options)
    return [tokenizer.decode(row).strip() for row in tokens]
