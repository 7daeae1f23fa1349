"""verify.py and --verify as their users start them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral
import pytest
from transformers import LlamaForCausalLM, MistralForCausalLM

from mmcore.constants import EXIT_DONE, EXIT_FAULT, EXIT_USAGE
from tests.tools.sabotage import QKV, convert_mistral, edit_layer, swap_rows

ROOT = Path(__file__).parents[2]
CONVERTERS = ROOT / "tools" / "converters"


@pytest.fixture
def decoder(tmp_path: Path, language: Callable[..., Any]) -> Path:
    return convert_mistral(tmp_path, language)


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
