"""The converters as their users start them: from any folder, by path."""

import os
import subprocess
import sys
from pathlib import Path

from mmcore.constants import EXIT_DONE, EXIT_USAGE
from mmcore.models.architecture import load_architecture

ROOT = Path(__file__).parents[2]
CONVERTERS = ROOT / "tools" / "converters"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_from_weights_to_a_model(clip_file: Path, mistral_folder: Path) -> None:
    folder = clip_file.parent
    for command in (
        f"{CONVERTERS}/clip.py --input clip.pt --output vision --head-width 16 --activation quick_gelu",
        f"{CONVERTERS}/mistral.py --input hf --output language",
        f"{CONVERTERS}/combine.py --vision vision --language language --output model --seed 7",
    ):
        result = run(folder, *command.split())
        assert (result.returncode, result.stderr) == (EXIT_DONE, ""), result.stderr
    assert result.stdout.startswith(f"wrote model: {19 + 9 + 4} tensors")
    assert load_architecture(folder / "model").image_token_id == 150


def test_a_mistake_is_one_paragraph(clip_file: Path) -> None:
    result = run(
        clip_file.parent, f"{CONVERTERS}/clip.py", "--input", "clip.pt", "--output", "vision", "--head-width", "48"
    )
    assert result.returncode == EXIT_USAGE and result.stdout == ""
    assert result.stderr.startswith("clip.py: ") and "Traceback" not in result.stderr and "\n\n" not in result.stderr
    assert [path.name for path in clip_file.parent.iterdir()] == ["clip.pt"]


def test_ended_in_the_middle_it_leaves_nothing(clip_file: Path) -> None:
    script = (
        f"import os, signal, sys; sys.path.insert(0, {str(CONVERTERS)!r})\n"
        "import clip\n"
        "from checkpoint_folder import StoredTensor\n"
        "StoredTensor.read = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = 'clip.py --input clip.pt --output vision --head-width 16 --activation quick_gelu'.split()\n"
        "sys.exit(clip.run(clip.ClipConfig, clip.convert))\n"
    )
    result = run(clip_file.parent, "-c", script)
    assert result.returncode == 128 + 15, result.stderr
    assert [path.name for path in clip_file.parent.iterdir()] == ["clip.pt"]
