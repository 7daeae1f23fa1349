"""Recipes have the numbers of their sources; docs/training.md and performance.md show commands that are taken."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmcore.commands.train import parse
from mmcore.config import ParallelConfig, RunConfig
from mmcore.config_yaml import merge
from mmcore.data.templates import TEMPLATES
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION, compose
from mmcore.recipes import RECIPES
from mmcore.training.memory import training_bytes

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "training.md").read_text()
PAGES = PAGE + (DOCS / "performance.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGES, re.DOTALL)
# Samples of LLaVA's blip_laion_cc_sbu_558k.json and llava_v1_5_mix665k.json.
PRETRAIN_SAMPLES, SFT_SAMPLES = 558_128, 665_298
# Steps, global batch, lr, min lr, warmup, weight decay, clip, beta2, sequence, tensor parallel size, trained parts.
NUMBERS: dict[str, tuple[Any, ...]] = {
    "mistral_clip_pretrain": (20000, 256, 1.5e-4, 1e-5, 0.01, 0.01, 1.0, 0.95, 1024, 4, "P"),
    "mistral_clip_sft": (20000, 128, 1e-6, 1e-7, 0.01, 0.1, 0.5, 0.95, 2048, 4, "PL"),
    "llava15_vicuna_pretrain": (PRETRAIN_SAMPLES / 256, 256, 1e-3, 0.0, 0.03, 0.0, 1.0, 0.999, 2048, 1, "P"),
    "llava15_vicuna_sft": (SFT_SAMPLES / 128, 128, 2e-5, 0.0, 0.03, 0.0, 1.0, 0.999, 2048, 4, "PL"),
    "llava_moss2_pretrain": (5000, 256, 2e-3, 0.0, 0.03, 0.0, 1.0, 0.999, 2048, 1, "P"),
    "llava_moss2_sft": (10000, 64, 2e-5, 0.0, 0.03, 0.0, 1.0, 0.999, 2048, 1, "PL"),
}
PARTS = {"vision_projection": "P", "language_model": "L", "vision_model": "V"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_the_sources(name: str) -> None:
    config = RECIPES[name]()
    steps, batch, lr, min_lr, warmup, decay, clip, beta2, length, tensor, trained = NUMBERS[name]
    assert config.train.steps == math.ceil(steps)
    assert config.train.global_batch_size == batch
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.weight_decay, optimizer.clip_grad) == (lr, min_lr, decay, clip)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.lr_decay_style) == (0.9, beta2, "cosine")
    # Megatron-LM takes a fraction of the steps, transformers' trainer rounds it up.
    assert optimizer.lr_warmup_steps == math.ceil(round(warmup * config.train.steps, 6))
    assert (config.data.seq_length, config.parallel.tensor_model_parallel_size) == (length, tensor)
    assert config.data.packing_buffer_size == 0, "batches of the sources count samples"
    assert "".join(sign for part, sign in PARTS.items() if part not in config.model.freeze) == trained
    assert config.train.precision == "bf16" and config.data.conversation in TEMPLATES
    for world_size in (8, 64):
        config.train.check_batch_sizes(config.parallel.data_parallel_size(world_size))


def test_checkpoints_of_the_sources() -> None:
    """Steps between them and how many stay, where the source says so: Megatron-LM's keeps them all."""
    found = {name: RECIPES[name]().checkpoint for name in NUMBERS}
    assert [found[f"mistral_clip_{name}"].save_interval for name in ("pretrain", "sft")] == [1000, 500]
    moss2 = [found[f"llava_moss2_{name}"] for name in ("pretrain", "sft")]
    assert [(one.save_interval, one.keep_last) for one in moss2] == [(1000, 5), (2000, 5)]
    assert RECIPES["mistral_clip_sft"]().parallel.distributed_timeout_minutes == 60


def test_every_recipe_of_the_page_exists() -> None:
    table = PAGE.split("## Recipes\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [name for name in RECIPES if "quickstart" not in name]
    for name, row in re.findall(r"^\| `(\w+)` \|(.*)\|$", table, re.MULTILINE):
        steps, batch, lr = (cell.strip() for cell in row.split("|")[:3])
        config = RECIPES[name]()
        assert (int(steps), int(batch)) == (config.train.steps, config.train.global_batch_size)
        rates = [float(rate) for rate in lr.split(" to ")]
        assert rates == [rate for rate in (config.optimizer.lr, config.optimizer.min_lr) if rate]


def commands() -> list[list[str]]:
    """Words after `mmcore train` of every command of the page but the first, which is its outline."""
    lines = "\n".join(text for kind, text in BLOCKS if not kind).replace("\\\n", " ").splitlines()
    return [shlex.split(line.split("mmcore train ")[1]) for line in lines if "mmcore train " in line][1:]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_taken(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, text in BLOCKS:
        if kind == "yaml":
            name, content = text.split("\n", 1)
            Path(name.removeprefix("# ")).write_text(content)
    config, only_print = parse(words)
    assert only_print or config != RECIPES[words[0]]()


def test_there_are_commands() -> None:
    assert len(commands()) > 8


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "yaml"])
def test_yaml_is_taken(text: str) -> None:
    assert merge(RunConfig(), yaml.safe_load(text), "docs/training.md") != RunConfig()


def test_options_in_the_text_exist() -> None:
    for section, name in set(re.findall(r"--(\w+)\.([a-z][a-z0-9-]*)", PAGES)):
        assert hasattr(getattr(RunConfig(), section), name.replace("-", "_")), f"--{section}.{name}"


def test_table_of_memory() -> None:
    language = LANGUAGE["mistral_7b_v03"]
    model = compose(VISION["clip_vit_l_14_336"], language, PROJECTOR["megatron_mlp"](language))
    rows = re.findall(r"^\| (\d) \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for tensor, replicas, *stated, host in rows:
        for states, gigabytes in zip(("full", "lean"), stated, strict=True):
            (counted,) = training_bytes(
                model,
                ("vision_model",),
                ParallelConfig(tensor_model_parallel_size=int(tensor)),
                data_parallel_size=int(replicas),
                layers=[language.num_layers],
                precision="bf16",
                states=states,
            )
            assert (f"{counted.total / 1e9:.1f}", f"{counted.copies / 1e9:.1f}") == (gigabytes, host)
