"""verify.py: that it finds what is wrong, and says where."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama
import megatron_ranks
import memory
import mistral
import probe
import pytest
import siglip
import torch
import verify
from checkpoint_folder import stored_tensors, write_checkpoint
from conversion import VerificationError
from megatron_ranks import Difference
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM, SiglipVisionModel

from mmcore.config import ParallelConfig
from mmcore.constants import EXIT_DONE, EXIT_FAULT, EXIT_USAGE, MODEL_FILE
from mmcore.models import language as language_model
from mmcore.models.architecture import (
    Architecture,
    LanguageArch,
    ProjectorArch,
    RotaryScaling,
    VisionArch,
    load_architecture,
    save_architecture,
)
from tests.tools import parity

ROOT = Path(__file__).parents[2]
CONVERTERS = ROOT / "tools" / "converters"
ONE_RANK, TWO_RANKS = verify.LAYOUTS[:1], verify.LAYOUTS[:2]
QKV = "language_model.decoder.layers.self_attention.linear_qkv.weight"


@pytest.fixture
def decoder(tmp_path: Path, language: Callable[..., Any]) -> Path:
    """A Mistral with a window; its checkpoint is beside it."""
    language(MistralForCausalLM, sliding_window=24).save_pretrained(tmp_path / "hf")
    mistral.convert(mistral.MistralConfig(input=tmp_path / "hf", output=tmp_path / "language"))
    return tmp_path / "language"


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_that_were_rounded(tmp_path: Path, language: Callable[..., Any], dtype: str) -> None:
    """By a converter's --dtype, or an export's: the other side is rounded alike, and the report tells it."""
    model = language(LlamaForCausalLM)
    model.save_pretrained(tmp_path / "hf")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "rounded")
    llama.convert(llama.LlamaConfig(input=tmp_path / "hf", output=tmp_path / "narrow", dtype=dtype))
    llama.convert(llama.LlamaConfig(input=tmp_path / "hf", output=tmp_path / "wide"))
    for checkpoint, reference, notes in (
        ("narrow", "hf", [f"the original's language_model was rounded to torch.{dtype}, as the checkpoint's is"]),
        ("narrow", "rounded", []),
        ("wide", "rounded", []),
    ):
        references = (tmp_path / reference,)
        found = verify.outcomes(tmp_path / checkpoint, references, ONE_RANK, 120.0, parity.run_original)
        with closing(found):
            outcome = next(found)
        assert outcome.worst.error < parity.TOLERANCE and outcome.original.notes == notes


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_ranks_that_fail_leave_none_behind(decoder: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def compute(*_: object) -> list[Difference]:
        if torch.distributed.get_rank() == 1 and fault == "raises":
            raise RuntimeError("out of luck")
        time.sleep(600)
        return []

    monkeypatch.setattr(megatron_ranks, "differences", compute)
    started, place = time.monotonic(), decoder.parent
    error, message = {
        "raises": (VerificationError, "tensor parallel size 2.*could not be run(.|\n)*out of luck"),
        "hangs": (TimeoutError, "not done after 5 seconds"),
    }[fault]
    outcomes = verify.outcomes(decoder, (place / "hf",), TWO_RANKS[1:], 5.0, parity.run_original)
    with closing(outcomes), pytest.raises(error, match=message):
        next(outcomes)
    assert time.monotonic() - started < 60
    assert sorted(path.name for path in place.iterdir()) == ["hf", "language"]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


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


LANGUAGE = LanguageArch(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=12,
    max_position_embeddings=32,
)
VISION = VisionArch(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, image_size=32, patch_dim=8)


def test_layouts_that_an_architecture_does_not_allow() -> None:
    allowed, left_out = verify.split_layouts(Architecture(language=LANGUAGE))
    assert [verify.layout_name(layout) for layout in allowed] == [
        "tensor parallel size 1, pipeline parallel size 1",
        "tensor parallel size 2, pipeline parallel size 1",
    ]
    assert [line.split(" left out: ")[0] for line in left_out] == [
        "tensor parallel size 4, pipeline parallel size 1",
        "tensor parallel size 1, pipeline parallel size 2",
        "tensor parallel size 2, pipeline parallel size 2",
    ]
    assert "key-value heads of the language model (2)" in left_out[0]
    assert "does not divide the 3 layers" in left_out[1] and "does not divide the 3 layers" in left_out[2]
    assert verify.split_layouts(Architecture(vision=VISION)) == (list(verify.LAYOUTS), [])


def test_the_probe() -> None:
    """Text before, between and after two images; no image token in it, though that is one of the vocabulary's."""
    whole = Architecture(
        vision=VISION, vision_projection=ProjectorArch(ffn_hidden_size=64), language=LANGUAGE, image_token_id=5
    )
    cases = probe.build_probe(whole)
    assert list(cases) == ["pixels", "text", "text around two images"]
    assert cases["pixels"]["images"].shape == (2, 3, 32, 32)
    assert cases["text"]["tokens"].shape == (2, 32) and not cases["text"]["is_image"].any()
    mixed = cases["text around two images"]
    assert torch.equal(mixed["images"], cases["pixels"]["images"])
    runs, lengths = mixed["is_image"][0].unique_consecutive(return_counts=True)
    assert runs.tolist() == [False, True, False, True, False] and lengths[1] == lengths[3] == 16
    assert set(cases["text"]["tokens"].flatten().tolist()) == set(range(12)) - {5}
    assert 5 not in mixed["tokens"]
    outside = probe.build_probe(replace(whole, image_token_id=12))["text"]["tokens"]
    assert set(outside.flatten().tolist()) == set(range(12))


def test_the_probe_goes_beyond_what_is_near() -> None:
    stretched = replace(LANGUAGE, rotary_scaling=RotaryScaling(rope_type="dynamic", factor=2.0))
    near, far = replace(LANGUAGE, sliding_window=100), replace(LANGUAGE, sliding_window=4096)
    lengths = {"text": 32, "long text": 32 + 24}
    for arch, wanted, beyond in (
        (LANGUAGE, {"text": 32}, []),
        (stretched, lengths, []),
        (near, {"text": 32, "long text": 124}, []),
        (far, {"text": 32}, ["no probe reaches beyond the window of 4096 tokens"]),
        (replace(stretched, sliding_window=4096), lengths, ["no probe reaches beyond the window of 4096 tokens"]),
    ):
        architecture = Architecture(language=arch)
        cases = probe.build_probe(architecture)
        assert {name: case["tokens"].shape[1] for name, case in cases.items()} == wanted
        assert probe.unreached(architecture) == beyond


# ---- The command


def run(folder: Path, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def test_the_report(tmp_path: Path, language: Callable[..., Any]) -> None:
    """Of a layout that is left out as well, and of a window that is out of reach."""
    language(MistralForCausalLM, num_key_value_heads=2, sliding_window=4096).save_pretrained(tmp_path / "hf")
    mistral.convert(mistral.MistralConfig(input=tmp_path / "hf", output=tmp_path / "language"))
    result = run(tmp_path, CONVERTERS / "verify.py", "--checkpoint", "language", "--reference", "hf")
    assert (result.returncode, result.stderr) == (EXIT_DONE, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("computes what transformers' MistralForCausalLM does")
    for line, (tensor, pipeline) in zip(lines[1:5], ((1, 1), (2, 1), (1, 2), (2, 2)), strict=True):
        assert line.startswith(f"  tensor parallel size {tensor}, pipeline parallel size {pipeline}: "), line
        assert 0 < float(line.split(": ")[1].split(",")[0]) < 1e-5, line
    assert lines[5].startswith("  tensor parallel size 4, pipeline parallel size 1 left out: ")
    assert lines[6:] == ["  no probe reaches beyond the window of 4096 tokens"]


def test_exit_codes_and_streams(decoder: Path) -> None:
    folder, command = decoder.parent, (CONVERTERS / "verify.py", "--checkpoint", "language", "--reference")
    edit_layer(decoder, QKV, 2, swap_rows)
    result = run(folder, *command, "hf")
    assert (result.returncode, result.stdout) == (EXIT_FAULT, "")
    assert result.stderr.startswith("verify.py: the checkpoint does not compute what transformers' MistralForCausalLM")
    assert (
        "At tensor parallel size 1, pipeline parallel size 1, given text, language_model.decoder.layers.2 is the f"
        in (result.stderr)
    )
    assert result.stderr.count("\n") == 1
    result = run(folder, *command, "language")  # not what it was made of, but itself
    assert (result.returncode, result.stdout) == (EXIT_USAGE, "")
    assert (
        result.stderr.startswith("verify.py: language is no original that can be run")
        and result.stderr.count("\n") == 1
    )
    result = run(folder, CONVERTERS / "verify.py", "--checkpoint", "hf")
    assert (result.returncode, result.stdout) == (EXIT_USAGE, "")
    assert result.stderr.startswith("verify.py: hf is no checkpoint") and result.stderr.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "language"]


def test_ended_in_the_middle_it_leaves_nothing(decoder: Path) -> None:
    """Neither files nor processes: a converter ends verify.py, and that its ranks."""
    folder = decoder.parent
    process = subprocess.Popen(
        [sys.executable, CONVERTERS / "mistral.py", "--input", "hf", "--output", "again", "--verify"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob(".verify-*/theirs/index.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "language"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_converter_proves_itself(tmp_path: Path, language: Callable[..., Any]) -> None:
    language(LlamaForCausalLM).save_pretrained(tmp_path / "hf")
    result = run(tmp_path, CONVERTERS / "llama.py", "--input", "hf", "--output", "language", "--verify")
    assert (result.returncode, result.stderr) == (EXIT_DONE, "")
    assert "computes what transformers' LlamaForCausalLM does" in result.stdout
    assert result.stdout.count("  tensor parallel size") == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "language"]


def test_a_wrong_map_leaves_nothing(tmp_path: Path, language: Callable[..., Any]) -> None:
    language(LlamaForCausalLM).save_pretrained(tmp_path / "hf")
    script = (
        f"import sys; sys.path.insert(0, {str(CONVERTERS)!r})\n"
        "import torch, decoder, layout\n"
        "decoder.stack_rows = layout.Layout('up above gate', lambda gate, up: torch.cat([up, gate]), None)\n"
        "import llama\n"
        "sys.argv = 'llama.py --input hf --output language --verify'.split()\n"
        "sys.exit(llama.run(llama.LlamaConfig, llama.convert))\n"
    )
    result = run(tmp_path, "-c", script)
    assert (result.returncode, result.stdout) == (EXIT_FAULT, "")
    assert "language_model.decoder.layers.0 is the first place that differs" in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
