"""Checkpoints to break, and ways to break them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mistral
from checkpoint_folder import stored_tensors, write_checkpoint
from torch import Tensor
from transformers import MistralForCausalLM

from mmcore.constants import MODEL_FILE
from mmcore.models.architecture import load_architecture, save_architecture

QKV = "language_model.decoder.layers.self_attention.linear_qkv.weight"


def convert_mistral(folder: Path, language: Callable[..., Any]) -> Path:
    """A Mistral with a window in `folder/hf`; its checkpoint, which is returned, is in `folder/language`."""
    language(MistralForCausalLM, sliding_window=24).save_pretrained(folder / "hf")
    mistral.convert(mistral.MistralConfig(input=folder / "hf", output=folder / "language"))
    return folder / "language"


def edit_part(checkpoint: Path, part: str, **changes: object) -> None:
    """Change one part's architecture in model.json."""
    architecture = load_architecture(checkpoint)
    changed: Any = replace(getattr(architecture, part), **changes)
    save_architecture(replace(architecture, **{part: changed}), checkpoint)


def edit_layer(checkpoint: Path, key: str, layer: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change the weights of one layer."""
    tensors = stored_tensors(checkpoint, key.split(".")[0])
    chunks = list(tensors[key].chunks)
    read = chunks[layer]
    chunks[layer] = lambda: change(read())
    tensors[key] = replace(tensors[key], chunks=tuple(chunks))
    changed = checkpoint.with_name("changed")
    changed.mkdir()
    write_checkpoint(changed, tensors)
    shutil.copy(checkpoint / MODEL_FILE, changed)
    shutil.rmtree(checkpoint)
    changed.rename(checkpoint)


def swap_rows(tensor: Tensor) -> Tensor:
    return tensor[[1, 0, *range(2, len(tensor))]]
