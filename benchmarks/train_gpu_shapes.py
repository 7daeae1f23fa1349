"""Models and samples that `benchmarks.train_gpu` measures, and the operations of a sample. No torch."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from mmcore.models.architecture import Architecture, LanguageArch, VisionArch
from mmcore.models.flops import Flops, Work, causal_pairs, step_flops
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION, compose
from mmcore.recipes import RECIPES

STAGES = ("pretrain", "sft")
NUM_STREAMS = 8  # that the loader deals samples to
FP8_RECIPE: Literal["delayed"] = "delayed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model, and samples of one picture and so much text that all of a stage are of one length."""

    vision: VisionArch
    language: LanguageArch
    is_preset: bool
    """Whether the model is the one that the recipes are for."""
    precision: str
    """Unless another is asked for."""
    seq_length: int
    """Positions of a packed row at most."""
    lengths: dict[str, int]
    """Positions of a sample, by stage."""
    labels: dict[str, int]
    """Of them trained: a caption, or two thirds of a conversation."""
    rows: dict[str, int]
    """Of a step of the complete trainer: about as many samples as the recipe's global batch."""
    batches: tuple[int, ...]
    """Samples of a step of the others."""
    num_rows: int
    """In the shards, of different samples. Each stream gets as many: what is left of an epoch fills whole rows too."""
    num_workers: int

    def architecture(self) -> Architecture:
        return compose(self.vision, self.language, PROJECTOR["megatron_mlp"](self.language))

    def samples_per_row(self, stage: str) -> int:
        return self.seq_length // self.lengths[stage]

    def num_samples(self, stage: str) -> int:
        return self.num_rows * self.samples_per_row(stage)

    @staticmethod
    def recipe(stage: str) -> str:
        return f"mistral_clip_{stage}"

    @staticmethod
    def states(stage: str, precision: str) -> Literal["full", "lean"]:
        """What the optimizer keeps: a language model of 7B that is trained has to be lean to fit one GPU."""
        return "lean" if stage == "sft" and precision != "fp32" else "full"


SHAPES = {
    "7b": Shape(
        vision=VISION["clip_vit_l_14_336"],
        language=LANGUAGE["mistral_7b_v03"],
        is_preset=True,
        precision="bf16",
        seq_length=8192,
        lengths={"pretrain": 640, "sft": 1088},
        labels={"pretrain": 64, "sft": 341},
        rows={"pretrain": 21, "sft": 18},
        batches=(1, 8, 32),
        num_rows=8 * NUM_STREAMS,
        num_workers=8,
    ),
    "tiny": Shape(
        vision=VisionArch(
            num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, image_size=16, patch_dim=8
        ),
        language=replace(
            LANGUAGE["mistral_7b_v03"],
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=80,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
        ),
        is_preset=False,
        precision="fp32",
        seq_length=70,
        lengths={"pretrain": 16, "sft": 32},
        labels={"pretrain": 12, "sft": 17},
        rows={"pretrain": 2, "sft": 2},
        batches=(1, 2),
        num_rows=NUM_STREAMS,
        num_workers=0,
    ),
}


def number_format(precision: str) -> str:
    """Of what is not computed in FP8."""
    return "bf16" if precision == "fp8" else precision


def is_trained(shape: Shape, stage: str, name: str) -> bool:
    """Whether the recipe trains a parameter, by its name in the whole model."""
    return not any(re.match(rf"{part}\.", name) for part in RECIPES[shape.recipe(stage)]().model.freeze)


def sample_flops(shape: Shape, stage: str) -> Flops:
    """What a sample needs."""
    length = shape.lengths[stage]
    work = Work(num_images=1, num_positions=length, num_pairs=causal_pairs(length), num_labels=shape.labels[stage])
    return step_flops(shape.architecture(), work, lambda name: is_trained(shape, stage, name))
