"""The command line is light, says what is wrong in one paragraph, and leaves nothing behind."""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mmcore.commands.train import as_yaml, parse
from mmcore.config import OptimizerConfig, RunConfig, TrainConfig
from mmcore.config_yaml import merge
from mmcore.models.architecture import save_architecture
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION
from mmcore.recipes import RECIPES
from tests import tiny

# Fails when torch is imported: what is said before a run must not need it.
NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        assert name.split(".")[0] != "torch", "torch was imported"
sys.meta_path.insert(0, Refuse())
sys.argv[0] = "mmcore"
from mmcore.__main__ import main
sys.exit(main())
"""


def mmcore(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NO_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["train"], ["train", "--help"], ["train", "quickstart_sft", "--help"]]
)
def test_help(arguments: list[str]) -> None:
    done = mmcore(*arguments)
    assert done.returncode == 0 and "usage: mmcore" in done.stdout and not done.stderr


@pytest.mark.parametrize("verb", ["prepare", "inspect", "generate", "evaluate"])
def test_help_of_every_verb(verb: str) -> None:
    done = mmcore(verb, "--help")
    assert done.returncode == 0 and f"usage: mmcore {verb}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "'trian' is not a verb, did you mean 'train'?"),
        (["train", "quickstart_stf"], "'quickstart_stf' is not a recipe, did you mean 'quickstart_sft'?"),
        (["train", "quickstart_sft", "--optimizer.lrr", "1"], "--optimizer.lr FLOAT"),
        (["train", "quickstart_sft", "--optimizer.lr", "-1"], "--optimizer.lr must be above 0, not -1.0"),
        (["train", "quickstart_sft", "--train.steps", "x"], "invalid literal"),
        (["train", "quickstart_sft", "--config", "missing.yaml"], "--config missing.yaml cannot be read"),
        (["train", "quickstart_sft"], "give --data.path"),
        (["train", "quickstart_sft", "--data.path", "nowhere"], "--data.path nowhere does not exist"),
        (["train", "quickstart_sft", "--data.path", "."], "give --checkpoint.save"),
        (["train", "quickstart_sft", "--data.path", ".", "--checkpoint.save", "x"], "give --model.checkpoint"),
        (
            ["generate", "--checkpoint", ".", "--task", "coco", "--data", "x", "--output", "y"],
            "is no checkpoint and holds none",
        ),
        (["inspect", "x", "--checkpoint", "."], "is no checkpoint and holds none"),
        (["inspect", "x", "--checkpoint", ".", "--show", "3"], "give --output, a folder for it"),
        (["evaluate", "cocoa", "--predictions", "p", "--references", "r"], "cocoa"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    done = mmcore(*arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_layouts_that_do_not_fit_are_refused_without_torch(tmp_path: Path) -> None:
    save_architecture(tiny.architecture(), tmp_path)
    base = [
        "train",
        "quickstart_sft",
        "--data.path",
        ".",
        "--data.seq-length",
        "128",
        "--checkpoint.save",
        tmp_path / "run",
        "--model.checkpoint",
        tmp_path,
    ]
    done = mmcore(*base, "--parallel.tensor-model-parallel-size", 4, env={"WORLD_SIZE": "4"})
    assert done.returncode == 2 and "does not divide the key-value heads" in done.stderr
    done = mmcore(*base, "--parallel.tensor-model-parallel-size", 2, env={"WORLD_SIZE": "3"})
    assert done.returncode == 2 and "3 ranks cannot be dealt to replicas of 2" in done.stderr
    done = mmcore(*base, env={"WORLD_SIZE": "3"})
    assert done.returncode == 2 and "is not a multiple of --train.micro-batch-size" in done.stderr
    done = mmcore(*base, "--model.language", "mistral_7b_v03")
    assert done.returncode == 2 and "4 in the checkpoint, 32 in the preset" in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_rank_says_what_is_wrong(tmp_path: Path) -> None:
    """However the ranks race: torchrun ends all of them when the first fails."""
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        "-m",
        "mmcore",
        "train",
        "quickstart_sft",
    ]
    for _ in range(3):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr.count("mmcore train: no data: give --data.path") == 1


def test_it_is_quick() -> None:
    """The promise is 0.3 s and 1.5 s; twice as much here, for a busy machine. torch alone takes longer than either."""
    for arguments, bar in ((["--help"], 0.6), (["train", "quickstart_sft", "--optimizer.lr", "-1"], 3.0)):
        started = time.perf_counter()
        mmcore(*arguments)
        assert time.perf_counter() - started < bar


@pytest.mark.parametrize("recipe", RECIPES)
def test_printed_config_is_taken_back(recipe: str, tmp_path: Path) -> None:
    config, _ = parse([recipe, "--train.seed", "7", "--model.freeze", "vision_model"])
    file = tmp_path / "run.yaml"
    file.write_text(as_yaml(config))
    other = next(name for name in RECIPES if name != recipe)
    assert parse([other, "--config", str(file)])[0] == config
    assert parse([other, "--config", str(file), "--train.seed", "8"])[0].train.seed == 8  # the command line is stronger


def test_yaml_names_the_nearest_key() -> None:
    with pytest.raises(ValueError, match=r"f: unknown key 'train.step', did you mean 'steps'\?"):
        merge(RunConfig(), {"train": {"step": 3}}, "f")
    with pytest.raises(ValueError, match=r"'train.steps' takes a int, not 'many'"):
        merge(RunConfig(), {"train": {"steps": "many"}}, "f")
    with pytest.raises(ValueError, match=r"'train' is a section"):
        merge(RunConfig(), {"train": 3}, "f")
    assert merge(RunConfig(), yaml.safe_load("optimizer: {lr: 1e-4}"), "f").optimizer.lr == 1e-4


def test_yaml_takes_one_of_the_choices() -> None:
    with pytest.raises(ValueError, match=r"f: 'train.precision' is one of 'fp32', 'bf16', not 'fp16'"):
        merge(RunConfig(), {"train": {"precision": "fp16"}}, "f")
    assert merge(RunConfig(), {"train": {"precision": "fp32"}}, "f").train.precision == "fp32"


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("parallel: {overlap_param_gather: true}", ["--parallel.overlap-grad-reduce"]),
        ("parallel: {sequence_parallel: true}", ["--parallel.tensor-model-parallel-size", "2"]),
        ("checkpoint: {keep_every: 500}", ["--checkpoint.save-interval", "500"]),
        ("eval: {interval: 5}", ["--eval.task", "coco", "--eval.data", "x"]),
        ("train: {rampup_batch_size: [2, 4, 9]}", ["--train.global-batch-size", "10"]),
        ("train: {stages: [{until: 400}, {until: 900}]}", ["--train.steps", "900"]),
    ],
)
def test_one_half_of_a_pair_from_yaml_the_other_as_an_option(
    content: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    parse(["quickstart_sft", "--config", str(file), *options])
    with pytest.raises(SystemExit) as exit_:
        parse(["quickstart_sft", "--config", str(file)])
    assert exit_.value.code == 2 and "Value error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [{"lr": math.nan}, {"lr": math.inf}, {"clip_grad": -1.0}, {"adam_beta2": 1.0}, {"weight_decay": math.nan}],
)
def test_numbers_that_no_optimizer_takes(given: dict[str, float]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=f"--optimizer.{name.replace('_', '-')} must be"):
        OptimizerConfig(**given)


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"8 is not a multiple of .* 3 x 2 data parallel ranks"):
        TrainConfig(global_batch_size=8, micro_batch_size=3).num_microbatches(2)


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_a_recipe_names_presets_that_exist(recipe: Callable[[], RunConfig]) -> None:
    model = recipe().model
    for name, table in ((model.vision, VISION), (model.language, LANGUAGE), (model.projector, PROJECTOR)):
        assert not name or name in table


def test_yaml_and_options_are_judged_together(tmp_path: Path) -> None:
    """A stage too short for the recipe's warmup is no mistake where the command line shortens that."""
    path = tmp_path / "stages.yaml"
    path.write_text("train: {steps: 60, stages: [{name: a, until: 20}, {name: b}]}\n")
    given = ["quickstart_sft", "--config", str(path)]
    with pytest.raises(ValueError, match="lr-warmup-steps 20 must be below the 20 of the shortest stage"):
        parse(given)
    assert parse([*given, "--optimizer.lr-warmup-steps", "3"])[0].train.stage_ends() == (20, 60)
