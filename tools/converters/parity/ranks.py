"""What megatron-core makes of a checkpoint, on real ranks, against what the original made of it.

Runs mmcore's own models through its own loading, as training does. Ranks are forked, so that a layout
costs no imports, and compare place by place as they compute: no hidden state outlives its layer.
"""

import json
import logging
import os
import signal
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from parity.probe import EMBEDDED, EMBEDDING, LOGITS, NORM, PIXELS, PROJECTION, watch, watch_layers
from reference import read_index
from torch import Tensor
from torch.multiprocessing import start_processes

from mmcore import checkpoint, distributed
from mmcore.config import ParallelConfig
from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL
from mmcore.models.architecture import Architecture, load_architecture
from mmcore.models.language import LanguageModel, language_config
from mmcore.models.llava import TOWERS, LlavaModel, base_config
from mmcore.models.vision import vision_config

from megatron.core import parallel_state  # isort: skip  (after mmcore.distributed, which mends it)
from megatron.core.transformer.module import MegatronModule  # isort: skip


class Difference(NamedTuple):
    """How far ours is from the original at one place."""

    case: str
    place: str
    error: float
    """Largest absolute difference, of the original's largest absolute value; infinite where shapes differ."""
    note: str = ""


def compare(layout: ParallelConfig, folder: Path, probe: Path, theirs: Path, timeout: float) -> list[Difference]:
    """Run a checkpoint at one layout.

    Args:
        probe: file of the cases.
        theirs: folder of what the original computed of them.
        timeout: seconds to wait for the ranks.
    Returns:
        The worst of all ranks, place by place.
    Raises:
        ProcessRaisedException: a rank failed; its traceback is in the message.
        TimeoutError: the time ran out.
    """
    world_size = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # ends the other ranks without a word
    with TemporaryDirectory() as results:
        arguments = (world_size, port, layout, folder, probe, theirs, Path(results))
        context = start_processes(_run, arguments, world_size, join=False, start_method="fork")
        assert context is not None
        deadline = time.monotonic() + timeout
        try:
            while not context.join(max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"the ranks were not done after {timeout:.0f} seconds; --timeout allows more")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        files = [Path(results) / f"{rank}.json" for rank in range(world_size)]
        found = [Difference(*row) for file in files for row in json.loads(file.read_text())]
    return _worst([(case, place) for case, place in read_index(theirs).places], found)


def _worst(places: list[tuple[str, str]], found: list[Difference]) -> list[Difference]:
    """Of all ranks, place by place; places that only one side has are infinitely far apart."""
    worst = {place: Difference(*place, float("inf"), "it is missing in ours") for place in places}
    order, previous = list(places), -1
    for difference in found:
        place = (difference.case, difference.place)
        if place not in order:
            order.insert(previous + 1, place)
        previous = order.index(place)
    for difference in sorted(found, key=lambda difference: difference.error):
        worst[difference.case, difference.place] = difference
    return [worst[place] for place in order]


def _run(
    rank: int, world_size: int, port: int, layout: ParallelConfig, folder: Path, probe: Path, theirs: Path, out: Path
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler waits for gloo to return, which may never be
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    distributed.initialize(layout, seed=1)
    found = differences(layout, folder, probe, theirs)
    (out / f"{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


class _Comparison:
    """Holds each of our hidden states against the original's."""

    def __init__(self, theirs: Path, architecture: Architecture) -> None:
        self.theirs, self.case = theirs, ""
        image, language = architecture.image_token_id, architecture.language
        # Its image token beyond our vocabulary: an export has more rows, and so more logits.
        self.is_extended = image is not None and language is not None and image >= language.vocab_size
        self.found: list[Difference] = []

    def note(self, place: str, ours: Tensor) -> None:
        """`ours` batch first."""
        if place.startswith(VISION_MODEL) and self.case != PIXELS:
            return  # the tower is compared on its own, with all of its layers
        path = self.theirs / self.case / f"{place}.pt"
        if not path.is_file():
            self.found.append(Difference(self.case, place, float("inf"), "it is missing in the original"))
            return
        theirs = torch.load(path, mmap=True, weights_only=True)
        if place == LOGITS and self.is_extended:
            theirs = theirs[..., : ours.shape[-1]]
        if ours.shape != theirs.shape:
            note = f"it is {list(ours.shape)}, the original's {list(theirs.shape)}"
            self.found.append(Difference(self.case, place, float("inf"), note))
            return
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        self.found.append(Difference(self.case, place, error if error == error else float("inf")))

    def note_sequence_first(self, place: str, ours: Tensor) -> None:
        self.note(place, ours.transpose(0, 1))


class Tower(MegatronModule):
    """A vision tower or a language model alone, under the name that it has in a whole model."""

    def __init__(self, architecture: Architecture, **base: Any) -> None:
        vision, language = architecture.vision, architecture.language
        if vision is not None:
            config = vision_config(vision, **base)
        else:
            assert language is not None
            config = language_config(language, **base)
        super().__init__(config=config)
        self.pre_process = parallel_state.is_pipeline_first_stage()
        self.post_process = parallel_state.is_pipeline_last_stage()
        if vision is not None and self.pre_process:
            self.vision_model = TOWERS[vision.model_subtype](vision, config, "local")
        if language is not None:
            self.language_model = LanguageModel(
                language, config, "local", pre_process=self.pre_process, post_process=self.post_process
            )

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        self.language_model.set_input_tensor(input_tensor)

    def forward(self, tokens: Tensor, images: None) -> Tensor:
        """As `LlavaModel.forward`, without images."""
        embedding = self.language_model.embedding if self.pre_process else None
        return self.language_model(None if embedding is None else embedding(input_ids=tokens, position_ids=None))


@torch.no_grad()
def differences(layout: ParallelConfig, folder: Path, probe: Path, theirs: Path) -> list[Difference]:
    """What this rank finds, megatron-core's groups being up."""
    architecture = load_architecture(folder)
    base = {**base_config(layout), "perform_initialization": False}  # all is loaded: random weights cost minutes
    is_whole = architecture.vision_projection is not None
    model = (LlavaModel(architecture, "local", **base) if is_whole else Tower(architecture, **base)).eval()
    checkpoint.load_checkpoint(folder, model)
    _round(model, read_index(theirs).dtypes)
    comparison = _Comparison(theirs, architecture)
    _watch(model, comparison)
    for case, inputs in torch.load(probe, weights_only=True).items():
        comparison.case = case
        if case != PIXELS:
            logits = _read(model, architecture, **inputs)
            if logits is not None:
                comparison.note(LOGITS, logits)
        elif model.pre_process:
            _see(model.vision_model, **inputs)
    return comparison.found


def _round(model: Any, dtypes: dict[str, str]) -> None:
    """Round weights as the original's are, which matters where an export was asked to."""
    for part, dtype in dtypes.items():
        for parameter in getattr(model, part).parameters() if hasattr(model, part) else ():
            parameter.data = parameter.to(getattr(torch, dtype)).float()


def _watch(model: Any, comparison: _Comparison) -> None:
    if hasattr(model, VISION_MODEL):
        watch_layers(model.vision_model.decoder.layers, VISION_MODEL, EMBEDDED, comparison.note_sequence_first)
    if hasattr(model, PROJECTION):
        watch(model.vision_projection, PROJECTION, comparison.note)
    if hasattr(model, LANGUAGE_MODEL):
        decoder = model.language_model.decoder
        before = EMBEDDING if model.pre_process else None
        first = decoder.layers[0].layer_number - 1
        watch_layers(decoder.layers, LANGUAGE_MODEL, before, comparison.note_sequence_first, first=first)
        if model.post_process:
            watch(decoder.final_layernorm, NORM, comparison.note_sequence_first)


def _see(tower: Any, images: Tensor) -> None:
    """Run all layers, also those above the feature layer, which are kept for the way out and else never run."""
    for layer in tower.decoder.layers:
        layer.is_run = True
    tower(images)
    for layer in tower.decoder.layers:
        layer.is_run = layer.layer_number <= tower.arch.num_layers_run


def _read(
    model: Any, architecture: Architecture, tokens: Tensor, is_image: Tensor, images: Tensor | None = None
) -> Tensor | None:
    """Logits [b, s, vocabulary] on the last stage."""
    assert architecture.language is not None
    if architecture.image_token_id is not None:
        tokens = tokens.masked_fill(is_image, architecture.image_token_id)
    if not model.pre_process:
        hidden = torch.empty(*tokens.T.shape, architecture.language.hidden_size)  # [s, b, h]
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor([hidden])
    output = model(tokens, images)
    if model.post_process:
        return output.unflatten(0, tokens.shape)
    dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None
