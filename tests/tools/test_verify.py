"""verify.py: that it finds what is wrong, and says where."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import clip
import combine
import export_hf
import mistral
import pytest
import siglip
import torch
import verify
from checkpoint_folder import stored_tensors, write_checkpoint
from conversion import VerificationError
from parity import memory
from parity import ranks as megatron_ranks
from parity.ranks import Difference
from torch import Tensor
from transformers import CLIPVisionModel, MistralForCausalLM, SiglipVisionModel

from mmcore.config import ParallelConfig
from mmcore.constants import MODEL_FILE
from mmcore.models import language as language_model
from mmcore.models.architecture import (
    RotaryScaling,
    load_architecture,
)
from tests.tools import parity
from tests.tools.sabotage import QKV, convert_mistral, edit_layer, edit_part, swap_rows

ONE_RANK, TWO_RANKS = verify.LAYOUTS[:1], verify.LAYOUTS[:2]


@pytest.fixture
def decoder(tmp_path: Path, language: Callable[..., Any]) -> Path:
    return convert_mistral(tmp_path, language)


@pytest.fixture
def encoder(tmp_path: Path, tower: Callable[..., Any]) -> Path:
    tower(SiglipVisionModel, vision_use_head=False).save_pretrained(tmp_path / "hf")
    siglip.convert(siglip.SiglipConfig(input=tmp_path / "hf", output=tmp_path / "vision"))
    return tmp_path / "vision"


def first_difference(
    checkpoint: Path, layouts: Sequence[ParallelConfig] = ONE_RANK, reference: str = "hf"
) -> tuple[str, Difference]:
    """Name of the layout that fails first, and what it says."""
    references = (checkpoint.parent / reference,)
    with closing(verify.outcomes(checkpoint, references, layouts, 120.0, parity.run_original)) as outcomes:
        for outcome in outcomes:
            if difference := outcome.first_above(parity.TOLERANCE):
                assert verify.describe(outcome, parity.TOLERANCE).count(difference.place) == 1
                return verify.layout_name(outcome.layout), difference
    raise AssertionError("nothing was found")


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_swapped_rows_of_one_layer(decoder: Path, layer: int) -> None:
    edit_layer(decoder, QKV, layer, swap_rows)
    _, found = first_difference(decoder)
    assert found.place == f"language_model.decoder.layers.{layer}" and 1e-3 < found.error < 2, found


@pytest.mark.parametrize(
    ("changes", "case"),
    [
        ({"rotary_base": 20_000.0}, "text"),
        ({"rotary_scaling": RotaryScaling(rope_type="linear", factor=1.05)}, "text"),
        (
            {"rotary_scaling": RotaryScaling(rope_type="dynamic", factor=2.0), "max_position_embeddings": 48},
            "long text",
        ),
        ({"layernorm_epsilon": 1e-3}, "text"),
        ({"sliding_window": 23}, "text"),
        ({"sliding_window": None}, "text"),
    ],
)
def test_a_wrong_number_of_the_language_model(decoder: Path, changes: dict[str, object], case: str) -> None:
    edit_part(decoder, "language", **changes)
    _, found = first_difference(decoder)
    assert (found.case, found.place) == (case, "language_model.decoder.layers.0"), found


def test_a_window_that_only_a_long_text_leaves(decoder: Path, language: Callable[..., Any]) -> None:
    language(MistralForCausalLM, sliding_window=50).save_pretrained(decoder.parent / "wider")
    edit_part(decoder, "language", sliding_window=49)
    _, found = first_difference(decoder, reference="wider")
    assert (found.case, found.place) == ("long text", "language_model.decoder.layers.0"), found


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"activation": "quick_gelu"}, "decoder.layers.0"),
        ({"activation": "gelu"}, "decoder.layers.0"),  # nearly the same: 5e-4 apart at most
        ({"layernorm_epsilon": 1e-3}, "decoder.layers.0"),
        ({"num_attention_heads": 4}, "decoder.layers.0"),
    ],
)
def test_a_wrong_number_of_the_tower(encoder: Path, changes: dict[str, object], place: str) -> None:
    edit_part(encoder, "vision", **changes)
    _, found = first_difference(encoder)
    assert (found.case, found.place) == ("pixels", f"vision_model.{place}"), found


def test_layers_above_the_feature_layer(encoder: Path) -> None:
    """They feed no projector, and are proven all the same."""
    edit_layer(encoder, "vision_model.decoder.layers.mlp.linear_fc1.weight", 3, swap_rows)
    assert load_architecture(encoder).vision.feature_layer == -2
    _, found = first_difference(encoder)
    assert found.place == "vision_model.decoder.layers.3"


def test_another_number_of_layers(decoder: Path, language: Callable[..., Any]) -> None:
    model = language(MistralForCausalLM, sliding_window=24)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    model.save_pretrained(decoder.parent / "short")
    _, found = first_difference(decoder, reference="short")
    assert (found.place, found.note) == ("language_model.decoder.layers.2", "it is missing in the original")
    mistral.convert(mistral.MistralConfig(input=decoder.parent / "short", output=decoder.parent / "two"))
    _, found = first_difference(decoder.parent / "two")
    assert (found.place, found.note) == ("language_model.decoder.layers.2", "it is missing in ours")


def test_another_vocabulary(decoder: Path) -> None:
    """Both fill the same padded table."""
    edit_part(decoder, "language", vocab_size=149)
    _, found = first_difference(decoder)
    assert found.place == "language_model.output_layer"
    assert found.note == "it is [2, 40, 149], the original's [2, 40, 150]"


def test_a_mistake_of_one_layout(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = language_model.gather_from_tensor_model_parallel_region

    def in_another_order(logits: Tensor) -> Tensor:
        whole = gather(logits)
        return whole if whole.shape == logits.shape else whole.roll(logits.shape[-1], -1)

    monkeypatch.setattr(language_model, "gather_from_tensor_model_parallel_region", in_another_order)
    layout, found = first_difference(decoder, TWO_RANKS)
    assert layout == "tensor parallel size 2, pipeline parallel size 1"
    assert found.place == "language_model.output_layer"


def test_numbers_that_are_none(decoder: Path) -> None:
    edit_layer(decoder, "language_model.decoder.layers.mlp.linear_fc2.weight", 1, lambda tensor: tensor * torch.nan)
    _, found = first_difference(decoder)
    assert (found.place, found.error) == ("language_model.decoder.layers.1", float("inf"))


def test_tensors_that_do_not_fit(decoder: Path) -> None:
    edit_part(decoder, "language", ffn_hidden_size=80)
    with pytest.raises(VerificationError, match="tensor parallel size 1, pipeline parallel size 1 could not be run"):
        first_difference(decoder)


def test_without_an_original_it_is_the_export(decoder: Path, tower: Callable[..., Any]) -> None:
    """Of a whole model; the towers' exports are tested where they are made."""
    folder = decoder.parent
    tower(CLIPVisionModel).save_pretrained(folder / "clip")
    clip.convert(clip.ClipConfig(input=folder / "clip", output=folder / "vision"))
    parts = {"vision": folder / "vision", "language": decoder}
    combine.convert(combine.CombineConfig(**parts, output=folder / "model"))
    assert parity.check(folder / "model") < parity.TOLERANCE
    key = "vision_projection.encoder.linear_fc2.weight"
    changed = stored_tensors(folder / "model", "vision_projection")
    read = changed[key].chunks[0]
    changed[key] = replace(changed[key], chunks=(lambda: swap_rows(read()),))
    others = stored_tensors(folder / "model", "vision_model") | stored_tensors(folder / "model", "language_model")
    (folder / "other").mkdir()
    write_checkpoint(folder / "other", others | changed)
    shutil.copy(folder / "model" / MODEL_FILE, folder / "other")
    export_hf.convert(export_hf.ExportConfig(input=folder / "model", output=folder / "export"))
    _, found = first_difference(folder / "other", reference="export")
    assert (found.case, found.place) == ("text around two images", "vision_projection")
    wide = combine.CombineConfig(**parts, output=folder / "wide", projector="megatron_mlp")
    combine.convert(wide)
    with pytest.raises(ValueError, match="export the towers"):
        parity.check(folder / "wide")


def children() -> set[str]:
    """Process ids; other tests may have left multiprocessing's own helpers, which live as long as pytest."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile
            found |= set((task / "children").read_text().split())
    return found


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_ranks_that_fail_leave_none_behind(decoder: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def compute(*_: object) -> list[Difference]:
        if torch.distributed.get_rank() == 1 and fault == "raises":
            raise RuntimeError("out of luck")
        time.sleep(600)
        return []

    monkeypatch.setattr(megatron_ranks, "differences", compute)
    before, started, place = children(), time.monotonic(), decoder.parent
    error, message = {
        "raises": (VerificationError, "tensor parallel size 2.*could not be run(.|\n)*out of luck"),
        "hangs": (TimeoutError, "not done after 5 seconds"),
    }[fault]
    outcomes = verify.outcomes(decoder, (place / "hf",), TWO_RANKS[1:], 5.0, parity.run_original)
    with closing(outcomes), pytest.raises(error, match=message):
        next(outcomes)
    assert time.monotonic() - started < 60
    assert sorted(path.name for path in place.iterdir()) == ["hf", "language"]
    assert children() <= before


def test_too_little_memory(decoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       32000000 kB\nMemAvailable:    1000000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    message = r"of 0.00 billion parameters in fp32 takes 2 GB of memory and 1 GB are free"
    with pytest.raises(ValueError, match=message):
        verify.prove(verify.VerifyConfig(checkpoint=decoder, reference=(tmp_path / "hf",)))
    # A converter refuses before it converts.
    with pytest.raises(ValueError, match=message):
        mistral.convert(mistral.MistralConfig(input=tmp_path / "hf", output=tmp_path / "other", verify=True))
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match=r"7.00 billion .* takes 48 GB"):
        memory.check_memory(7_000_000_000)
    meminfo.write_text("MemAvailable:    3000000 kB\n")
    memory.check_memory(100_000_000)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    memory.check_memory(7_000_000_000)
