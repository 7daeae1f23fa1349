"""Run an original model in fp32 and keep what it computes at every place that verify.py compares.

`python tools/converters/reference.py --input Mistral-7B-v0.3 --checkpoint language --probe probe.pt --output theirs`

A process of its own: it must see a torch that no one mended, and be gone before ours is loaded.
Models are built by the original libraries from their own configuration; no weight map is used, and no
code of a model's folder is run.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import run
from originals import open_original
from probe import EMBEDDED, EMBEDDING, LOGITS, NORM, PIXELS, PROJECTION, watch, watch_layers
from torch import Tensor

from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL
from mmcore.models.architecture import load_architecture

INDEX = "index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceConfig:
    """Run an original model in fp32 and keep what it computes."""

    input: tuple[Path, ...]
    """The original: a folder or a file of weights; of a LLaVA's own its folder and the vision tower's."""
    checkpoint: Path
    """What was made of it; its model.json has the sizes that a mere file of weights does not tell."""
    probe: Path
    """File of the inputs."""
    output: Path
    """Folder for what it computes: CASE/PLACE.pt, and index.json with its name and the places in order."""


class _Recorder:
    """Writes hidden states as they come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.case = folder, ""
        self.places: list[tuple[str, str]] = []

    def note(self, place: str, tensor: Tensor) -> None:
        if place.startswith(VISION_MODEL) and self.case != PIXELS:
            return  # the tower is compared on its own
        (self.folder / self.case).mkdir(parents=True, exist_ok=True)
        torch.save(tensor.clone(), self.folder / self.case / f"{place}.pt")
        self.places.append((self.case, place))


@torch.no_grad()
def record(config: ReferenceConfig) -> list[str]:
    """Run all cases; returns the original's name.

    Raises:
        ValueError: the original cannot be opened, or has not the parts that the checkpoint has.
    """
    architecture = load_architecture(config.checkpoint)
    original = open_original(config.input, architecture)
    for part, ours, theirs in (
        ("vision tower", architecture.vision, original.tower),
        ("projector", architecture.vision_projection, original.projector),
        ("language model", architecture.language, original.read),
    ):
        if ours is not None and theirs is None:
            raise ValueError(f"the checkpoint has a {part} and {original.name} of {config.input[0]} has none")
    recorder = _Recorder(config.output)
    if original.tower is not None:
        watch_layers(original.tower_layers, VISION_MODEL, EMBEDDED, recorder.note)
    if original.projector is not None:
        watch(original.projector, PROJECTION, recorder.note)
    if original.norm is not None:
        watch_layers(original.language_layers, LANGUAGE_MODEL, EMBEDDING, recorder.note)
        watch(original.norm, NORM, recorder.note)
    for case, inputs in torch.load(config.probe, weights_only=True).items():
        recorder.case = case
        if case == PIXELS:
            assert original.tower is not None
            original.tower(inputs["images"])
        else:
            assert original.read is not None
            recorder.note(LOGITS, original.read(inputs["tokens"], inputs["is_image"], inputs.get("images")))
    (config.output / INDEX).write_text(json.dumps({"name": original.name, "places": recorder.places}))
    return [original.name]


if __name__ == "__main__":
    sys.exit(run(ReferenceConfig, record))
