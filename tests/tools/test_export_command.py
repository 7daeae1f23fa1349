"""export_hf.py as its user starts it: exit codes, signals, memory."""

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import decoder
import torch
from checkpoint_folder import StoredTensor, write_checkpoint
from transformers import CLIPVisionModel, LlamaForCausalLM, MistralForCausalLM
from weight_map import Move

from mmcore.constants import EXIT_DONE, EXIT_USAGE
from mmcore.models.architecture import Architecture, save_architecture
from tests import tiny
from tests.tools.conftest import build_language, build_tower
from tests.tools.test_command_line import CONVERTERS as SCRIPTS
from tests.tools.test_command_line import run
from tests.tools.test_export_hf import imported, joined


def test_the_command(tmp_path: Path) -> None:
    joined(build_tower(CLIPVisionModel), build_language(MistralForCausalLM), tmp_path)
    command = [str(SCRIPTS / "export_hf.py"), "--input", "model", "--output", "out"]
    done = run(tmp_path, *command)
    assert (done.returncode, done.stderr) == (EXIT_DONE, "") and done.stdout.startswith("wrote out: 114 tensors")
    again = run(tmp_path, *command)
    assert again.returncode == EXIT_USAGE and again.stdout == "" and "\n\n" not in again.stderr
    assert again.stderr.startswith("export_hf.py: --output ") and "Traceback" not in again.stderr


def test_ended_in_the_middle_it_leaves_nothing(tmp_path: Path) -> None:
    imported(build_language(LlamaForCausalLM), tmp_path / "language")
    before = sorted(tmp_path.iterdir())
    script = (
        f"import os, signal, sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import export_hf, safetensors_folder\n"
        "write, written = safetensors_folder._write_tensor, []\n"
        "def once(*arguments):\n"
        "    write(*arguments), written.append(1)\n"
        "    len(written) == 5 and os.kill(os.getpid(), signal.SIGTERM)\n"
        "safetensors_folder._write_tensor = once\n"
        "sys.argv = 'export_hf.py --input language --output out'.split()\n"
        "sys.exit(export_hf.run(export_hf.ExportConfig, export_hf.convert))\n"
    )
    ended = run(tmp_path, "-c", script)
    assert (ended.returncode, ended.stdout) == (128 + signal.SIGTERM, ""), ended.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_memory_is_that_of_the_largest_tensors(tmp_path: Path) -> None:
    """60 layers of 4 MB and tables of 4 MB leave in less than 60 MB more than nothing takes."""
    language = replace(tiny.LANGUAGE, num_layers=60, hidden_size=256, ffn_hidden_size=1024, vocab_size=4096)
    rows = decoder.weight_map(language)
    shapes = {row.target: row for row in rows if isinstance(row, Move)}
    tensors = {
        key: StoredTensor(
            shape=row.shape,
            dtype=torch.float32,
            chunks=tuple(partial(torch.ones, row.shape) for _ in range(60 if row.is_stacked else 1)),
            is_stacked=row.is_stacked,
        )
        for key, row in shapes.items()
    }
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model", tensors)
    save_architecture(Architecture(language=language), tmp_path / "model")
    script = (
        f"import resource, sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import export_hf\n"
        "from pathlib import Path\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "config = export_hf.ExportConfig(input=Path('model'), output=Path('out'), max_shard_size_gb=0.1)\n"
        "export_hf.plan(config)\n"
        "before = peak()\n"
        "export_hf.convert(config)\n"
        "print((peak() - before) // 1024)\n"
    )
    done = run(tmp_path, "-c", script)
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 200e6
    assert int(done.stdout) < 60, done.stderr
