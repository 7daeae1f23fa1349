"""The guide of examples/llava_mistral_clip: its commands with small files on this machine, and what sbatch is told."""

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mmcore.checkpoint_files import checkpoint_bytes
from mmcore.constants import MODULES
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION, compose
from mmcore.recipes import RECIPES
from tests.test_readme import SMALLER
from tests.test_readme import folder as folder  # a fixture: the published files, small

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "examples" / "llava_mistral_clip" / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
NO_MODEL = " ".join(SMALLER["train"].replace("--parallel.tensor-model-parallel-size 2", "").split())
SETTINGS = {"GPUS": "2", "TP": "2", "CLIP_OPTIONS": SMALLER["clip.py"], "OMP_NUM_THREADS": "1"}


def commands(block: str) -> list[str]:
    """One for each command line, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", block)
    return [line for line in text.splitlines() if line.strip()]


def test_all_steps_on_one_machine(folder: Path) -> None:
    """Two ranks, tensor parallel; then once more, where all is done already."""
    (folder / "examples").symlink_to(ROOT / "examples")
    with zipfile.ZipFile(folder / "images.zip", "w") as images, zipfile.ZipFile(folder / "train2017.zip", "w") as coco:
        for path in (folder / "images").iterdir():
            images.write(path, path.name)
            coco.write(path, f"train2017/{path.name}")
    rows = json.loads((folder / "llava_v1_5_mix665k.json").read_text())
    for row in rows[:6]:
        row["image"] = row["image"].replace("images/", "coco/train2017/")
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (weights,) = [block for block in BLOCKS if "convert.sh" in block]
    (machine,) = [block for block in BLOCKS if "evaluate.sh" in block]
    steps = commands(weights) + commands(machine)
    assert len(steps) == 6
    said: list[str] = []
    for step in [*steps, *(step for step in steps if re.search("(convert|prepare|sft).sh", step))]:
        smaller = NO_MODEL if re.search("(pretrain|sft).sh", step) else ""
        smaller = SMALLER["generate"].split(" --tensor")[0] if "generate.sh" in step else smaller
        done = subprocess.run(
            f"{step} {smaller}",
            shell=True,
            executable="/bin/bash",
            cwd=folder,
            env={**os.environ, **SETTINGS, "PATH": path},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
        said.append(done.stderr)
    for again, words in zip(said[-3:], ("is there already", "is there already", "nothing to do"), strict=True):
        assert words in again
    for run in ("pretrain", "sft"):
        assert (folder / "runs" / run / "DONE").exists() and not (folder / "runs" / run / "retries").exists()
        assert [path.name for path in (folder / "runs" / run).glob("step_*")] == ["step_00000002"]
        assert (folder / "data" / "inspection" / run / "report.html").exists()
    assert json.loads((folder / "runs" / "scores.json").read_text())["num_samples"] == 5


@pytest.fixture
def sbatch(tmp_path: Path) -> dict[str, str]:
    """An environment whose sbatch notes what it was told, and gives numbers to jobs."""
    program = tmp_path / "sbatch"
    program.write_text(
        "#!/bin/bash\n"
        f'echo "CHECKPOINT=$CHECKPOINT RUN=$RUN REQUEUE=$REQUEUE $*" >>{tmp_path}/jobs\n'
        f"echo $((100 + $(wc -l <{tmp_path}/jobs)))\n"
    )
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": "", "REQUEUE": ""}


def submitted(block: str, environment: dict[str, str], folder: Path) -> list[str]:
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=ROOT, env=environment, check=True, timeout=60)
    return (folder / "jobs").read_text().splitlines()


def test_the_three_jobs_follow_each_other(sbatch: dict[str, str], tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if "sft=$(" in block]
    here = "examples/llava_mistral_clip"
    assert submitted(block, sbatch, tmp_path) == [
        f"CHECKPOINT=weights/llava RUN=runs/pretrain REQUEUE= --parsable {here}/pretrain.sbatch",
        f"CHECKPOINT=runs/pretrain RUN=runs/sft REQUEUE= --parsable --dependency=afterok:101 {here}/sft.sbatch",
        f"CHECKPOINT=runs/sft RUN= REQUEUE= --dependency=afterok:102 {here}/evaluate.sbatch",
    ]


def test_a_chain_is_one(sbatch: dict[str, str], tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if "REQUEUE=0" in block]
    first, *others = submitted(block, sbatch, tmp_path)
    assert first == "CHECKPOINT=runs/pretrain RUN=runs/sft REQUEUE=0 --parsable examples/llava_mistral_clip/sft.sbatch"
    after = [re.search(r"--kill-on-invalid-dep=yes --dependency=afterok:(\d+) ", line) for line in others]
    assert [match and match[1] for match in after] == ["101", "102", "103"]


def test_dry_runs_of_the_page() -> None:
    for step in [step for block in BLOCKS for step in commands(block) if "--dry-run" in step]:
        done = subprocess.run(step, shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and shlex.split(done.stdout)[0] == "srun", done.stderr
    assert "--container-image=registry.example/mmcore:0.1 --container-mounts=/shared:/shared" in done.stdout


def test_numbers_of_the_page() -> None:
    language = LANGUAGE["mistral_7b_v03"]
    model = compose(VISION["clip_vit_l_14_336"], language, PROJECTOR["megatron_mlp"](language))
    sizes = [checkpoint_bytes(model, RECIPES[f"mistral_clip_{name}"]().model.freeze, 2) for name in ("pretrain", "sft")]
    assert f"{sizes[0] / 1e9:.0f} GB each in alignment, {sizes[1] / 1e9:.0f} GB in tuning" in PAGE
    weights = checkpoint_bytes(model, MODULES, 2)
    assert f"{2 * weights / 1e9:.0f} GB of weights" in PAGE, "the towers' and their join's"


def test_every_launcher_and_setting_is_told_of() -> None:
    folder = ROOT / "examples" / "llava_mistral_clip"
    for path in folder.iterdir():
        assert path.name in PAGE or path.name in ("README.md", "job.sh"), path.name
    for name in set(re.findall(r"^#   ([A-Z_]+)\b", (folder / "job.sh").read_text(), re.MULTILINE)):
        assert f"`{name}`" in PAGE, name


def test_the_table_of_exit_codes_is_the_launchers(tmp_path: Path) -> None:
    """What is said to follow, as job.sh's `judge` answers."""
    rows = re.findall(r"^\| (\d+|any other) \|.*\| (\w+)[^|]*\|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    answers = {"the": "finished", "requeued": "again", "stop": "stop"}
    (tmp_path / "DONE").touch()
    for code, follows in rows:
        script = f"source {ROOT}/examples/llava_mistral_clip/job.sh; RUN={tmp_path} retries=$RUN/retries signalled=0; "
        script += f"progress=newest_step; judge {code if code.isdigit() else 134}; echo $answer"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.strip() == answers[follows], (code, done.stderr)
