"""Join a vision and a language checkpoint, with a new projector between them.

`python tools/converters/combine.py --vision vision --language language --output model`
"""

import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from checkpoint_folder import StoredTensor, new_folder, stored_tensors, write_checkpoint
from command_line import run, summary
from torch import Tensor

from mmcore.constants import LANGUAGE_MODEL, MODEL_FILE, TOKENIZER_DIR, VISION_MODEL, VISION_PROJECTION
from mmcore.models.presets import PROJECTOR, Architecture, ProjectorArch, compose, load_architecture, save_architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineConfig:
    """Join a vision and a language checkpoint, with a new projector between them."""

    vision: Path
    """Checkpoint folder with a vision tower: clip.py's, or any other."""
    language: Path
    """Checkpoint folder with a language model and its tokenizer: mistral.py's, or any other."""
    output: Path
    """Folder to write."""
    projector: Literal["mlp2x_gelu", "linear", "megatron_mlp"] = "mlp2x_gelu"
    """LLaVA-1.5's two layers, LLaVA-1's one, or those of Megatron-LM's Mistral recipe."""
    projector_ffn_hidden_size: int = 0
    """Width between the two layers; 0 is the projector's own choice."""
    seed: int = 1234
    """Seed of the projector's weights."""
    overwrite: bool = False
    """Replace a checkpoint that is at the output."""


def initial_projector(
    projector: ProjectorArch, vision_hidden: int, language_hidden: int, seed: int
) -> dict[str, StoredTensor]:
    """Random weights, float32, the same for the same seed.

    Each layer's weight and bias are uniform within 1 / sqrt(inputs), which is torch's default for
    nn.Linear and what LLaVA leaves its projector at.

    Source: torch/nn/modules/linear.py reset_parameters; haotian-liu/LLaVA multimodal_projector/builder.py.
    """
    if projector.projector_type == "affine":
        layers = {"encoder": (language_hidden, vision_hidden)}
    else:
        width = projector.ffn_hidden_size
        layers = {"encoder.linear_fc1": (width, vision_hidden), "encoder.linear_fc2": (language_hidden, width)}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, StoredTensor] = {}
    for layer, (rows, inputs) in layers.items():
        for name, shape in (("weight", (rows, inputs)), ("bias", (rows,)))[: 2 if projector.add_bias_linear else 1]:
            values = torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            tensors[f"{VISION_PROJECTION}.{layer}.{name}"] = StoredTensor(
                shape=shape, dtype=values.dtype, chunks=(partial(_known, values),), is_stacked=False
            )
    return tensors


def _known(values: Tensor) -> Tensor:
    return values


def join(config: CombineConfig) -> Architecture:
    """The architecture of the whole.

    Raises:
        ValueError: a folder lacks the tower it is named for.
    """
    vision, language = load_architecture(config.vision), load_architecture(config.language)
    if vision.vision is None:
        raise ValueError(f"--vision {config.vision}: its {MODEL_FILE} has no vision tower; take what clip.py wrote")
    if language.language is None:
        raise ValueError(
            f"--language {config.language}: its {MODEL_FILE} has no language model; take what mistral.py wrote"
        )
    projector = PROJECTOR[config.projector](language.language)
    if config.projector_ffn_hidden_size:
        projector = replace(projector, ffn_hidden_size=config.projector_ffn_hidden_size)
    return compose(
        vision.vision,
        language.language,
        projector,
        conversation=language.conversation,
        sources=(*vision.sources, *language.sources),
    )


def convert(config: CombineConfig) -> list[str]:
    """Write the checkpoint.

    Returns:
        Lines that tell what was done.
    Raises:
        ValueError: the inputs do not fit, or the output is taken.
    """
    whole = join(config)
    assert whole.vision is not None and whole.language is not None and whole.vision_projection is not None
    projector = initial_projector(
        whole.vision_projection, whole.vision.hidden_size, whole.language.hidden_size, config.seed
    )
    tensors = stored_tensors(config.vision, VISION_MODEL) | projector | stored_tensors(config.language, LANGUAGE_MODEL)
    with new_folder(config.output, config.overwrite, config.vision, config.language) as folder:
        if (config.language / TOKENIZER_DIR).is_dir():
            shutil.copytree(config.language / TOKENIZER_DIR, folder / TOKENIZER_DIR)
        write_checkpoint(folder, tensors)
        save_architecture(whole, folder)
    return [
        *summary(config.output, tensors, Counter()),
        f"  projector {config.projector}, from seed {config.seed}: "
        + ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in projector.items()),
        f"  image token {whole.image_token_id}; {whole.vision.num_image_embeddings} for each image",
    ]


if __name__ == "__main__":
    sys.exit(run(CombineConfig, convert))
