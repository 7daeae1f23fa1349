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
from typing import NamedTuple

import torch
from checkpoint_folder import stored_tensors
from command_line import run
from parity.originals import Original, open_original
from parity.probe import EMBEDDED, EMBEDDING, LOGITS, NORM, PIXELS, PROJECTION, watch, watch_layers
from torch import Tensor, nn

from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import load_architecture

INDEX_FILE = "index.json"


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
    """Folder for what it computes: CASE/PLACE.pt, and index.json."""


class Index(NamedTuple):
    """Content of index.json."""

    name: str
    """Of the original."""
    places: list[tuple[str, str]]
    """Case and place of every hidden state, in the order of the computation."""
    dtypes: dict[str, str]
    """The narrowest that holds a part's weights, by mcore's names of the parts."""
    notes: list[str]
    """For the report."""


def read_index(folder: Path) -> Index:
    """What was recorded in a folder."""
    return Index(**json.loads((folder / INDEX_FILE).read_text()))


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


def _narrowest(module: nn.Module) -> torch.dtype:
    """The narrowest type that holds all weights as they are."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(parameter, parameter.to(dtype).float()) for parameter in module.parameters()):
            return dtype
    return torch.float32


def _round(module: nn.Module, part: str, checkpoint: Path) -> str:
    """Round weights as those of the checkpoint were (a converter's --dtype); returns what to tell of it."""
    kept = {tensor.dtype for tensor in stored_tensors(checkpoint, part).values()}
    dtype = kept.pop()
    if kept or dtype == torch.float32 or _narrowest(module) == dtype:
        return ""
    for parameter in module.parameters():
        parameter.data = parameter.to(dtype).float()
    return f"the original's {part} was rounded to {dtype}, as the checkpoint's is"


def _watch(original: Original, recorder: _Recorder) -> None:
    if original.tower is not None:
        watch_layers(original.tower_layers, VISION_MODEL, EMBEDDED, recorder.note)
    if original.projector is not None:
        watch(original.projector, PROJECTION, recorder.note)
    if original.norm is not None:
        watch_layers(original.language_layers, LANGUAGE_MODEL, EMBEDDING, recorder.note)
        watch(original.norm, NORM, recorder.note)


@torch.no_grad()
def record(config: ReferenceConfig) -> list[str]:
    """Run all cases; returns the original's name.

    Raises:
        ValueError: the original cannot be opened, or has not the parts that the checkpoint has.
    """
    architecture = load_architecture(config.checkpoint)
    original = open_original(config.input, architecture)
    notes, dtypes = [original.unproven], {}
    for part, ours, theirs in (
        (VISION_MODEL, architecture.vision, original.tower),
        (VISION_PROJECTION, architecture.vision_projection, original.projector),
        (LANGUAGE_MODEL, architecture.language, original.language),
    ):
        if ours is None:
            continue
        if theirs is None:
            raise ValueError(f"the checkpoint has a {part}, and {config.input[0]} ({original.name}) has none")
        notes.append(_round(theirs, part, config.checkpoint))
        dtypes[part] = str(_narrowest(theirs)).removeprefix("torch.")
    recorder = _Recorder(config.output)
    _watch(original, recorder)
    for case, inputs in torch.load(config.probe, weights_only=True).items():
        recorder.case = case
        if case == PIXELS:
            assert original.tower is not None
            original.tower(inputs["images"])
        else:
            assert original.read is not None
            recorder.note(LOGITS, original.read(inputs["tokens"], inputs["is_image"], inputs.get("images")))
    index = Index(original.name, recorder.places, dtypes, [note for note in notes if note])
    (config.output / INDEX_FILE).write_text(json.dumps(index._asdict()))
    return [original.name]


if __name__ == "__main__":
    sys.exit(run(ReferenceConfig, record))
