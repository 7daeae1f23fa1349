"""The launchers of examples/llava_mistral_clip: settings, --dry-run, and what follows each exit code on one machine."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "llava_mistral_clip"
FAKE = Path(__file__).with_name("fake_trainer.py")
LAUNCHERS = sorted(path for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch") and path.name != "job.sh")
TRAIN = {"CHECKPOINT": "weights/llava", "DATA": "my data", "RUN": "runs/a"}
ASK = {"CHECKPOINT": "runs/sft", "TASK": "coco", "DATA": "captions.json", "OUTPUT": "out/p.jsonl"}
SETTINGS: dict[str, dict[str, str]] = {
    "convert.sh": {"CLIP": "ViT.pt", "MISTRAL": "Mistral", "WEIGHTS": "weights"},
    "prepare.sh": {
        "PRETRAIN_ANNOTATIONS": "a.json b.json",
        "PRETRAIN_IMAGES": "images.zip",
        "SFT_ANNOTATIONS": "c.json",
        "SFT_IMAGES": "coco=train2017.zip gqa=gqa.zip",
        "DATA": "data",
    },
    "pretrain.sh": TRAIN,
    "sft.sh": TRAIN,
    "generate.sh": ASK,
    "evaluate.sh": {"TASK": "coco", "PREDICTIONS": "p.jsonl", "REFERENCES": "captions.json", "SCORES": "scores.json"},
    "pretrain.sbatch": TRAIN,
    "sft.sbatch": TRAIN,
    "evaluate.sbatch": {**ASK, "OUTPUT": "out"},
}
TRAIN_OPTIONS = "--model.checkpoint weights/llava --data.path my\\ data --checkpoint.save runs/a"
SRUN = "srun --export=ALL --kill-on-bad-exit=1 --distribution=block --open-mode=append"
MOUNTED = "--container-mounts=/raid:/raid --container-workdir=PWD"


def environment(**settings: str) -> dict[str, str]:
    """Of a shell in which nothing of the launchers' is set."""
    names = {"GPUS", "TP", "PP", "CP", "RECIPE", "CONFIG", "CONTAINER", "IMAGES", "MASTER_PORT", "MMCORE"}
    names |= {name for values in SETTINGS.values() for name in values}
    kept = {name: value for name, value in os.environ.items() if name not in names and not name.startswith("SLURM_")}
    return {**kept, "PYTHON": "python", **settings}


def launch(name: str, *options: str, cwd: Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(FOLDER / name), *options],
        env=environment(**settings),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_all_are_here() -> None:
    assert {path.name for path in LAUNCHERS} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_missing_setting_is_explained(name: str) -> None:
    text = (FOLDER / name).read_text()
    for missing in SETTINGS[name]:
        given = {setting: value for setting, value in SETTINGS[name].items() if setting != missing}
        done = launch(name, "--dry-run", **given)
        assert done.returncode != 0 and not done.stdout
        assert re.search(rf"{missing}: \S+ \S+", done.stderr), done.stderr
        assert missing in text.split("source ")[0], f"{missing} is not told of at the head of {name}"


@pytest.mark.parametrize(
    ("name", "settings", "options", "expected"),
    [
        (
            "convert.sh",
            {"CLIP_OPTIONS": "--verify --dtype bfloat16"},
            [],
            "python tools/converters/clip.py --output weights/clip --input ViT.pt --verify --dtype bfloat16\n"
            "python tools/converters/mistral.py --output weights/mistral --input Mistral\n"
            "python tools/converters/combine.py --output weights/llava --vision weights/clip "
            "--language weights/mistral --projector megatron_mlp\n",
        ),
        (
            "prepare.sh",
            {"WEIGHTS": "weights"},
            [],
            "python -m mmcore prepare llava-pretrain --annotations a.json b.json --images images.zip "
            "--output data/pretrain\n"
            "python -m mmcore prepare llava-instruct --annotations c.json --images coco=train2017.zip gqa=gqa.zip "
            "--output data/sft\n"
            "python -m mmcore inspect data/pretrain --checkpoint weights/llava --conversation plain --seq-length 1024 "
            "--output data/inspection/pretrain\n"
            "python -m mmcore inspect data/sft --checkpoint weights/llava --conversation mistral_instruct "
            "--seq-length 2048 --output data/inspection/sft\n",
        ),
        ("pretrain.sh", {"GPUS": "1"}, [], f"python -m mmcore train mistral_clip_pretrain {TRAIN_OPTIONS}\n"),
        (
            "sft.sh",
            {"GPUS": "8", "TP": "4", "PP": "2", "CP": "1", "CONFIG": "my run.yaml", "MASTER_PORT": "29501"},
            ["--train.steps", "10"],
            "export WORLD_SIZE=8 LOCAL_WORLD_SIZE=8 MASTER_ADDR=127.0.0.1 MASTER_PORT=29501\n"
            "for RANK in {0..7}; do RANK=$RANK LOCAL_RANK=$RANK python -m mmcore train mistral_clip_sft --config "
            f"my\\ run.yaml {TRAIN_OPTIONS} --parallel.tensor-model-parallel-size 4 "
            "--parallel.pipeline-model-parallel-size 2 --parallel.context-parallel-size 1 --train.steps 10 "
            "& done; wait\n",
        ),
        (
            "generate.sh",
            {"GPUS": "1", "IMAGES": "val2014", "TP": "1"},
            ["--batch-size", "8"],
            "python -m mmcore generate --checkpoint runs/sft --task coco --data captions.json --images val2014 "
            "--output out/p.jsonl --tensor-model-parallel-size 1 --batch-size 8\n",
        ),
        (
            "evaluate.sh",
            {},
            ["--gallery", "5"],
            "python -m mmcore evaluate coco --predictions p.jsonl --references captions.json --output scores.json "
            "--gallery 5\n",
        ),
        (
            "pretrain.sbatch",
            {"SLURM_CPUS_PER_TASK": "8"},
            [],
            f"{SRUN} --output=runs/a/logs/%j/rank-%4t.log --cpus-per-task=8 python -m mmcore train "
            f"mistral_clip_pretrain {TRAIN_OPTIONS}\n",
        ),
        (
            "sft.sbatch",
            {"CONTAINER": "nvcr.io#a/mmcore:1", "CONTAINER_MOUNTS": "/raid:/raid", "PYTHON": "", "RECIPE": "other"},
            ["--train.steps", "10"],
            f"{SRUN} --output=runs/a/logs/%j/rank-%4t.log --container-image=nvcr.io#a/mmcore:1 {MOUNTED} "
            f"python -m mmcore train other {TRAIN_OPTIONS} --train.steps 10\n",
        ),
        (
            "evaluate.sbatch",
            {"REFERENCES": "r.json"},
            [],
            f"{SRUN} --output=out/logs/%j/rank-%4t.log python -m mmcore generate --checkpoint runs/sft --task coco "
            "--data captions.json --output out/predictions.jsonl\n"
            "srun --export=ALL --nodes=1 --ntasks=1 python -m mmcore evaluate coco --predictions out/predictions.jsonl "
            "--references r.json --output out/scores.json\n",
        ),
    ],
)
def test_what_would_run(name: str, settings: dict[str, str], options: list[str], expected: str) -> None:
    before = set(ROOT.iterdir())
    done = launch(name, *options, "--dry-run", **{**SETTINGS[name], **settings})
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace(f"{ROOT}/tools", "tools").replace(f"workdir={ROOT}", "workdir=PWD")
    assert shown == expected
    assert set(ROOT.iterdir()) == before, "a dry run writes nothing"


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    for name in ("weights/clip/model.json", "data/pretrain/SHA256SUMS"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    done = launch("convert.sh", "--dry-run", cwd=tmp_path, **SETTINGS["convert.sh"])
    assert "weights/clip is there already" in done.stderr and "clip.py" not in done.stdout
    done = launch("prepare.sh", "--dry-run", cwd=tmp_path, **SETTINGS["prepare.sh"])
    assert "data/pretrain is there already" in done.stderr and "llava-pretrain" not in done.stdout


def test_wrong_settings(tmp_path: Path) -> None:
    for setting, value in (("GPUS", "0"), ("GPUS", "all"), ("TP", "1.5"), ("PP", "-1")):
        done = launch("sft.sh", "--dry-run", **{**TRAIN, setting: value})
        assert done.returncode == 2 and f"{setting}={value} is not a whole number above 0" in done.stderr
    done = launch("convert.sh", "--projector", "linear", **SETTINGS["convert.sh"])
    assert done.returncode == 2 and "--projector linear: there are no options but --dry-run" in done.stderr
    done = launch("sft.sbatch", "--dry-run", cwd=tmp_path, **TRAIN)
    assert done.returncode == 2 and "submit from the folder of mmcore" in done.stderr
    done = launch("sft.sbatch", "--dry-run", cwd=tmp_path, MMCORE=str(ROOT), **TRAIN)
    assert done.returncode == 0


class Job:
    """A run whose every start is planned, under pretrain.sh."""

    def __init__(self, run: Path, plan: str, ranks: int = 1) -> None:
        self.run = run
        run.mkdir(exist_ok=True)
        (run / "plan").write_text("\n".join(plan.split("; ")) + "\n")
        settings = {"CHECKPOINT": "c", "DATA": "d", "RUN": str(run), "GPUS": str(ranks), "PYTHON": str(FAKE)}
        self.process = subprocess.Popen(
            ["bash", str(FOLDER / "pretrain.sh")],
            env=environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, int]:
        """Its exit code, and how often it was started."""
        self.output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, len((self.run / "starts-0").read_text().splitlines())

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.run / name).exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("plan", "code", "starts", "said"),
    [
        ("step=4 done exit=0", 0, 1, "finished"),
        ("exit=1; exit=1; step=4 done exit=0", 0, 3, "exit code 1 at -1: retry 2 of 3 without progress"),
        ("exit=1; exit=1; exit=1; exit=1; done", 93, 4, "3 retries brought it no further than -1"),
        (
            "step=2 exit=1; exit=1; exit=1; step=4 exit=1; exit=137; exit=1; exit=1; done",
            93,
            7,
            "3 retries brought it no further than 4",
        ),
        ("exit=0; done exit=0", 0, 2, "DONE is not there at -1: retry 1 of 3"),
        ("exit=2; done", 2, 1, "wrong usage"),
        ("exit=16; done exit=0", 0, 2, "a step was suspect"),
        ("exit=16; exit=17; done", 17, 2, "it is the data or the model, not the machine"),
        ("exit=93; done", 93, 1, "not to be tried again"),
        ("exit=75; done", 75, 1, "preempted: saved"),
        ("exit=143; done exit=0", 0, 2, "exit code 143 at -1: retry 1 of 3"),
    ],
)
def test_exit_codes(plan: str, code: int, starts: int, said: str, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", plan)
    assert job.end() == (code, starts), job.output
    assert said in job.output
    assert not (tmp_path / "run" / "retries").exists() or code in (2, 17)


def test_faults_are_counted_over_starts_of_the_launcher(tmp_path: Path) -> None:
    """As under Slurm, where each requeue is one."""
    run = tmp_path / "run"
    assert Job(run, "exit=1; exit=1; exit=2").end() == (2, 3)
    assert (run / "retries").read_text() == "-1 2\n"
    assert Job(run, "-; -; -; exit=1; exit=1; done").end() == (93, 5)


def test_faults_that_cannot_be_counted_end_it(tmp_path: Path) -> None:
    (tmp_path / "run" / "retries").mkdir(parents=True)
    job = Job(tmp_path / "run", "exit=1; done")
    assert job.end() == (93, 1) and "retries cannot be written: see to the disk" in job.output


@pytest.mark.parametrize(("other", "least"), [("sleep=60", 0), ("signal=0.5", 0.5)])
def test_a_killed_rank_ends_the_others(other: str, least: float, tmp_path: Path) -> None:
    begun = time.monotonic()
    job = Job(tmp_path / "run", f"kill=1 {other}; step=4 done exit=0", ranks=2)
    assert job.end() == (0, 2), job.output
    assert "exit code 137" in job.output and least < time.monotonic() - begun < 30
    assert (tmp_path / "run" / "starts-1").read_text().count("of 2") == 2


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (os.kill, signal.SIGTERM),
        (os.kill, signal.SIGUSR1),
        (os.kill, signal.SIGINT),
        (os.killpg, signal.SIGINT),  # as a terminal does
        (os.killpg, signal.SIGTERM),  # as a container's end does
    ],
)
def test_a_signal_lets_all_ranks_save(send: Any, number: signal.Signals, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "signal=1.5; done exit=0", ranks=2)
    job.wait_for("ready-0")
    job.wait_for("ready-1")
    send(job.process.pid, number)
    assert job.end() == (75, 1), job.output
    assert (tmp_path / "run" / "step_00000001").is_dir() and "preempted: saved" in job.output
    assert Job(tmp_path / "run", "-; done exit=0", ranks=2).end() == (0, 2)


def test_a_signal_before_the_trainer_listens(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "sleep=60")
    job.wait_for("starts-0")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == (75, 1) and "ended by the signal, to be gone on with" in job.output


def test_they_are_sound() -> None:
    """--dry-run's lines can be pasted."""
    done = launch("sft.sh", "--dry-run", **{**TRAIN, "GPUS": "2", "RECIPE": "a'b"})
    words = shlex.split(done.stdout.splitlines()[1])
    assert "a'b" in words and "my data" in words
    for path in (*LAUNCHERS, FOLDER / "job.sh"):
        subprocess.run(["bash", "-n", str(path)], check=True)
