"""Run an original model in fp32 and keep what it computes at every place that verify.py compares.

`python tools/converters/reference.py --input Mistral-7B-v0.3 --checkpoint language --probe probe.pt --output theirs`

A process of its own: it must see a torch that no one mended, and be gone before ours is loaded.
Models are those of the original libraries, built from their own configuration; no weight map is used,
no code of a model's folder is run.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command_line import run
from probe import (
    EMBEDDED,
    EMBEDDING,
    LOGITS,
    NORM,
    PIXELS,
    PROJECTION,
    watch,
    watch_layers,
)
from torch import Tensor, nn
from weight_files import Weights, open_file, open_folder, read_json

from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL
from mmcore.models.architecture import VisionArch, load_architecture

INDEX = "index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceConfig:
    """Run an original model in fp32 and keep what it computes."""

    input: tuple[Path, ...]
    """The original: a folder or a file of weights; of the original LLaVA its folder and the vision tower's."""
    checkpoint: Path
    """What was made of it; its model.json has the sizes that a mere file of weights does not tell."""
    probe: Path
    """File of the inputs."""
    output: Path
    """Folder for what it computes: CASE/PLACE.pt, and index.json with their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """A model of another library: what to run and where to look."""

    name: str
    see: Callable[[Tensor], Any] | None = None
    """Run the tower on images [n, 3, h, w]."""
    vision_layers: Sequence[nn.Module] | nn.ModuleList = ()
    read: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    """Tokens int64 [b, s], bool [b, s] where an image embedding goes, images or None -> logits [b, s, v]."""
    language_layers: Sequence[nn.Module] | nn.ModuleList = ()
    norm: nn.Module | None = None
    """The norm after the last layer."""
    projector: nn.Module | None = None


# ---- Hugging Face


def _pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of transformers in fp32.

    Raises:
        ValueError: a tensor is missing, which transformers would make up.
    """
    model, report = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(f"{folder} is incomplete for transformers: it lacks {', '.join(missing)}")
    return model.eval()


def _language(model: Any, name: str) -> Original:
    return Original(
        name=name,
        read=lambda tokens, *_: model(input_ids=tokens, use_cache=False).logits,
        language_layers=model.model.layers,
        norm=model.model.norm,
    )


def _mistral(folder: Path) -> Original:
    from transformers import MistralForCausalLM

    return _language(_pretrained(MistralForCausalLM, folder), "transformers' MistralForCausalLM")


def _llama(folder: Path) -> Original:
    from transformers import LlamaForCausalLM

    return _language(_pretrained(LlamaForCausalLM, folder), "transformers' LlamaForCausalLM")


def _qwen2(folder: Path) -> Original:
    from transformers import Qwen2ForCausalLM

    return _language(_pretrained(Qwen2ForCausalLM, folder), "transformers' Qwen2ForCausalLM")


def _tower(model: Any, name: str) -> Original:
    return Original(name=name, see=model, vision_layers=model.encoder.layers)


def _clip(folder: Path) -> Original:
    from transformers import CLIPVisionModel

    return _tower(_pretrained(CLIPVisionModel, folder), "transformers' CLIPVisionModel")


def _siglip(folder: Path) -> Original:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig.from_pretrained(folder)
    config.vision_use_head = False  # a checkpoint of ours leaves without it
    return _tower(_pretrained(SiglipVisionModel, folder, config=config), "transformers' SiglipVisionModel")


def _llava(folder: Path) -> Original:
    from transformers import LlavaForConditionalGeneration

    model = _pretrained(LlavaForConditionalGeneration, folder)
    vision, language = model.model.vision_tower, model.model.language_model

    def read(tokens: Tensor, is_image: Tensor, images: Tensor | None) -> Tensor:
        # Whatever id the image token has, it is replaced: any that the text lacks will do.
        used = set(tokens.flatten().tolist())
        spare = next(token for token in range(len(used) + 1) if token not in used)
        model.config.image_token_id = spare
        tokens = tokens.masked_fill(is_image, spare)
        return model(input_ids=tokens, pixel_values=images, use_cache=False).logits

    return Original(
        name="transformers' LlavaForConditionalGeneration",
        see=vision,
        vision_layers=vision.encoder.layers,
        read=read,
        language_layers=language.layers,
        norm=language.norm,
        projector=model.model.multi_modal_projector,
    )


# By the model_type of config.json.
FOLDERS: dict[str, Callable[[Path], Original]] = {
    "mistral": _mistral,
    "llama": _llama,
    "qwen2": _qwen2,
    "clip": _clip,
    "clip_vision_model": _clip,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
    "llava": _llava,
}


def open_original(paths: Sequence[Path], checkpoint: Path) -> Original:
    """Build the original model.

    Raises:
        ValueError: it is of no kind that is known.
    """
    path = paths[0]
    kind = read_json(path / "config.json").get("model_type")
    if kind not in FOLDERS:
        raise ValueError(f"{path}: model_type is {kind!r}; the originals that can be run are {', '.join(FOLDERS)}")
    return FOLDERS[kind](path)


class _Recorder:
    """Writes hidden states as they come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.case = folder, ""
        self.places: list[tuple[str, str]] = []

    def note(self, place: str, tensor: Tensor) -> None:
        if place.startswith(VISION_MODEL) and self.case != PIXELS:
            return  # the tower is compared on its own
        (self.folder / self.case).mkdir(exist_ok=True)
        torch.save(tensor.detach().clone(), self.folder / self.case / f"{place}.pt")
        self.places.append((self.case, place))


@torch.no_grad()
def record(config: ReferenceConfig) -> list[str]:
    """Run all cases; returns the original's name."""
    original = open_original(config.input, config.checkpoint)
    recorder = _Recorder(config.output)
    if original.vision_layers:
        watch_layers(original.vision_layers, VISION_MODEL, EMBEDDED, recorder.note)
    if original.projector is not None:
        watch(original.projector, PROJECTION, recorder.note)
    if original.language_layers:
        watch_layers(original.language_layers, LANGUAGE_MODEL, EMBEDDING, recorder.note)
    if original.norm is not None:
        watch(original.norm, NORM, recorder.note)
    config.output.mkdir(exist_ok=True)
    for case, inputs in torch.load(config.probe, weights_only=True).items():
        recorder.case = case
        if case == PIXELS:
            assert original.see is not None
            original.see(inputs["images"])
        else:
            assert original.read is not None
            logits = original.read(inputs["tokens"], inputs["is_image"], inputs.get("images"))
            recorder.note(LOGITS, logits)
    (config.output / INDEX).write_text(json.dumps({"name": original.name, "places": recorder.places}))
    return [original.name]


if __name__ == "__main__":
    sys.exit(run(ReferenceConfig, record))
