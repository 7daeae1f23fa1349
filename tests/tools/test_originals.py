"""originals.py and reference.py: what the original is, and what it does not prove."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import clip
import llama
import pytest
import torch
import verify
from parity import originals
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from mmcore.models.architecture import (
    load_architecture,
)
from tests.tools import parity
from tests.tools.sabotage import convert_mistral


@pytest.fixture
def decoder(tmp_path: Path, language: Callable[..., Any]) -> Path:
    return convert_mistral(tmp_path, language)


def test_what_a_file_of_weights_does_not_prove(clip_file: Path) -> None:
    options: dict[str, Any] = {"head_width": 16, "activation": "quick_gelu"}
    clip.convert(clip.ClipConfig(input=clip_file, output=clip_file.parent / "vision", **options))
    found = verify.outcomes(clip_file.parent / "vision", (clip_file,), verify.LAYOUTS[:1], 120.0, parity.run_original)
    with closing(found):
        notes = next(found).original.notes
    assert notes == ["heads and activation are not proven: the original's file does not tell them"]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_originals_that_cannot_be_run(decoder: Path, clip_file: Path) -> None:
    folder = decoder.parent
    architecture = load_architecture(decoder)
    shutil.copytree(folder / "hf", folder / "incomplete")
    weights = load_file(folder / "hf" / "model.safetensors")
    del weights["norm.weight" if "norm.weight" in weights else "model.norm.weight"]
    save_file(weights, folder / "incomplete" / "model.safetensors", metadata={"format": "pt"})
    for name, changes in (("gpt", {"model_type": "gpt2"}), ("llava", {"mm_vision_tower": "openai/clip"})):
        (folder / name).mkdir()
        shutil.copy(folder / "hf" / "config.json", folder / name)
        edit_config(folder / name, **changes)
    for paths, message in (
        (("incomplete",), "incomplete for transformers' MistralForCausalLM: it lacks model.norm.weight"),
        (("gpt",), "model_type is 'gpt2'; the originals that can be run are llama, mistral, qwen2, clip"),
        (("llava",), r"two paths, this folder and the tower \(openai/clip\)"),
        (("hf", "gpt"), "is a whole original: leave out .*gpt"),
        (("nowhere",), "is no original that can be run"),
        (("clip.pt",), "is a vision tower, and the checkpoint has none"),
    ):
        with pytest.raises(ValueError, match=message):
            originals.open_original([folder / path for path in paths], architecture)


def test_no_code_of_a_folder_is_run(tmp_path: Path, language: Callable[..., Any]) -> None:
    language(LlamaForCausalLM).save_pretrained(tmp_path / "hf")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("configuration_own", "modeling_own"):
        (tmp_path / "hf" / f"{name}.py").write_text(code)
    places = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_config(tmp_path / "hf", auto_map=places)
    llama.convert(llama.LlamaConfig(input=tmp_path / "hf", output=tmp_path / "language"))
    parity.check(tmp_path / "language", tmp_path / "hf")
    assert not (tmp_path / "ran").exists()


def test_weights_that_were_rounded(tmp_path: Path, language: Callable[..., Any]) -> None:
    """By a converter's --dtype, or an export's: the other side is rounded alike, and the report tells it."""
    model = language(LlamaForCausalLM)
    model.save_pretrained(tmp_path / "hf")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    llama.convert(llama.LlamaConfig(input=tmp_path / "hf", output=tmp_path / "narrow", dtype="bfloat16"))
    llama.convert(llama.LlamaConfig(input=tmp_path / "hf", output=tmp_path / "wide"))
    for checkpoint, reference, notes in (
        ("narrow", "hf", ["the original's language_model was rounded to torch.bfloat16, as the checkpoint's is"]),
        ("narrow", "rounded", []),
        ("wide", "rounded", []),
    ):
        references = (tmp_path / reference,)
        found = verify.outcomes(tmp_path / checkpoint, references, verify.LAYOUTS[:1], 120.0, parity.run_original)
        with closing(found):
            outcome = next(found)
        assert outcome.worst.error < parity.TOLERANCE and outcome.original.notes == notes
