"""What the original and ours are both given, and the places at which they are compared.

The places are named as the modules of a checkpoint are, in the order in which they are computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import Architecture, LanguageArch

PIXELS = "pixels"
EMBEDDED = f"{VISION_MODEL}.embedded"
PROJECTION = VISION_PROJECTION
EMBEDDING = f"{LANGUAGE_MODEL}.embedding"
NORM = f"{LANGUAGE_MODEL}.decoder.final_layernorm"
LOGITS = f"{LANGUAGE_MODEL}.output_layer"

# Tokens of a usual text, those beyond a window's end, and the longest window that is worth it.
TEXT, BEYOND, FAR = 40, 24, 512

Note = Callable[[str, Tensor], None]


def build_probe(architecture: Architecture, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Inputs by case.

    "pixels" is for the tower alone: images float32 [2, 3, h, w], normalised. The others are for the
    language model or the whole: tokens int64 [b, s], is_image bool [b, s], and images if there are any.
    Cases get longer: transformers' dynamic rotary frequencies remember the longest sequence they saw.
    """
    random = torch.Generator().manual_seed(seed)
    vision, language = architecture.vision, architecture.language
    cases: dict[str, dict[str, Tensor]] = {}
    images = torch.empty(0)
    if vision is not None:
        images = torch.randn(2, 3, vision.image_size, vision.image_size, generator=random)
        cases[PIXELS] = {"images": images}
    if language is None:
        return cases
    texts = {}
    for name, length in _lengths(language).items():
        tokens = _text(architecture, (2, length), random)
        texts[name] = {"tokens": tokens, "is_image": torch.zeros_like(tokens, dtype=torch.bool)}
    if architecture.vision_projection is not None:
        assert vision is not None
        kinds = [0] * 5 + [1] * vision.num_image_embeddings + [0] * 3 + [1] * vision.num_image_embeddings + [0] * 7
        is_image = torch.tensor([kinds], dtype=torch.bool)
        tokens = _text(architecture, tuple(is_image.shape), random)
        texts["text around two images"] = {"tokens": tokens, "is_image": is_image, "images": images}
    return cases | dict(sorted(texts.items(), key=lambda case: case[1]["tokens"].shape[1]))


def unreached(architecture: Architecture) -> list[str]:
    """What lies too far into a sequence for the probe, or is not in it."""
    language = architecture.language
    ends = _ends(language) if language else {}
    reasons = [f"no probe reaches beyond {name}" for name, end in ends.items() if end > FAR]
    return reasons + ["no probe has the embedding that ends a row of tiles"] * architecture.pictures.has_newline


def _ends(language: LanguageArch) -> dict[str, int]:
    """Numbers of tokens beyond which the language model computes differently."""
    ends = {}
    if language.sliding_window is not None:
        ends[f"the window of {language.sliding_window} tokens"] = language.sliding_window
    if language.rotary_scaling is not None and language.rotary_scaling.rope_type == "dynamic":
        length = language.max_position_embeddings
        ends[f"the {length} positions after which rotary frequencies are stretched"] = length
    return ends


def _lengths(language: LanguageArch) -> dict[str, int]:
    text = min(TEXT, language.max_position_embeddings)
    longer = max((end + BEYOND for end in _ends(language).values() if end <= FAR), default=0)
    return {"text": text} | ({"long text": longer} if longer > text else {})


def _text(architecture: Architecture, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Any tokens but the image token, which may be one of the vocabulary's."""
    assert architecture.language is not None
    image, size = architecture.image_token_id, architecture.language.vocab_size
    if image is None or image >= size:
        return torch.randint(0, size, shape, generator=random)
    tokens = torch.randint(0, size - 1, shape, generator=random)
    return tokens + tokens.ge(image)


def watch_layers(
    layers: Sequence[nn.Module] | nn.ModuleList, module: str, before: str | None, note: Note, *, first: int = 0
) -> None:
    """Tell `note` what goes into the first of these layers and what comes out of each.

    Args:
        module: whose layers they are, e.g. `language_model`.
        before: name of what goes in; None where that is another stage's output.
        first: number of the first of them.
    """
    if before is not None:
        layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: note(before, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    for number, layer in enumerate(layers, first):
        watch(layer, f"{module}.decoder.layers.{number}", note)


def watch(module: nn.Module, place: str, note: Note) -> None:
    """Tell `note` what comes out of a module."""

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        note(place, output[0] if isinstance(output, tuple) else output)

    module.register_forward_hook(hook)
