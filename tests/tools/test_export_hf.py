"""export_hf.py: what leaves is, bit for bit, what came, and transformers computes with it what we do."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint_folder
import clip
import combine
import decoder
import encoder
import export_hf
import hugging_face_config
import llama
import llava
import mistral
import pytest
import qwen2
import siglip
import torch
from checkpoint_folder import StoredTensor, stored_tensors, write_checkpoint
from export_hf import ExportConfig, convert
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmcore.checkpoint import save_checkpoint
from mmcore.config import OptimizerConfig, ParallelConfig
from mmcore.models.architecture import (
    Architecture,
    LanguageArch,
    ProjectorArch,
    RotaryScaling,
    VisionArch,
    load_architecture,
    save_architecture,
)
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION, compose
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import train_step
from tests import ranks, tiny
from tests.tools import parity
from tests.tools.conftest import build_language, build_llava, build_tower
from tests.training.test_layouts import microbatches

State = dict[str, Tensor]
CONVERTERS: dict[type, tuple[Any, type]] = {
    CLIPVisionModel: (clip, clip.ClipConfig),
    CLIPModel: (clip, clip.ClipConfig),
    SiglipVisionModel: (siglip, siglip.SiglipConfig),
    MistralForCausalLM: (mistral, mistral.MistralConfig),
    LlamaForCausalLM: (llama, llama.LlamaConfig),
    Qwen2ForCausalLM: (qwen2, qwen2.Qwen2Config),
}


def imported(model: torch.nn.Module, folder: Path, shard_size: str = "1GB", **options: Any) -> Path:
    """A checkpoint made of one of transformers' models, which is saved beside it."""
    source = folder.with_name(f"{folder.name}_hf")
    model.save_pretrained(source, max_shard_size=shard_size)
    module, kind = CONVERTERS[type(model)]
    module.convert(kind(input=source, output=folder, **options))
    return folder


def joined(tower: torch.nn.Module, language: torch.nn.Module, folder: Path, **options: Any) -> Path:
    combine.convert(
        combine.CombineConfig(
            vision=imported(tower, folder / "vision", **options),
            language=imported(language, folder / "language"),
            output=folder / "model",
        )
    )
    return folder / "model"


def exported(checkpoint: Path, **options: Any) -> Path:
    output = checkpoint.with_name("exported")
    convert(ExportConfig(input=checkpoint, output=output, **options))
    return output


def weights(folder: Path) -> State:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name


def loads(kind: Any, folder: Path) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


COMPOSITIONS: dict[str, tuple[type, dict[str, Any], type, dict[str, Any], dict[str, Any]]] = {
    "clip + mistral": (CLIPVisionModel, {}, MistralForCausalLM, {"sliding_window": 12}, {}),
    "clip + llama": (
        CLIPVisionModel,
        {"hidden_act": "gelu"},
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"feature_layer": -1},
    ),
    "siglip + qwen2": (SiglipVisionModel, {"image_size": 36}, Qwen2ForCausalLM, {}, {"feature_layer": -1}),
    "siglip + qwen2, tied": (SiglipVisionModel, {}, Qwen2ForCausalLM, {"tie_word_embeddings": True}, {}),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    tower, vision, language, text, options = COMPOSITIONS[name]
    model = joined(build_tower(tower, **vision), build_language(language, **text), tmp_path, **options)
    folder = exported(model)
    found = loads(LlavaForConditionalGeneration, folder)
    assert found.dtype == torch.float32
    parity.check(model, folder)


@pytest.mark.parametrize("kind", [MistralForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM])
@pytest.mark.parametrize(
    ("options", "shard_size", "tied"), [({}, "1GB", False), ({"max_shard_size_gb": 5e-5}, "20KB", True)]
)
def test_a_language_model_comes_back(
    kind: type, options: dict[str, Any], shard_size: str, tied: bool, tmp_path: Path
) -> None:
    model = build_language(kind, tie_word_embeddings=tied).bfloat16()
    folder = exported(imported(model, tmp_path / "language", shard_size), **options)
    assert_same(weights(folder), weights(tmp_path / "language_hf"))
    assert (folder / "model.safetensors.index.json").exists() == bool(options)
    assert all(path.stat().st_size < 5e4 + 5000 for path in folder.glob("model-*.safetensors"))
    found = loads(AutoModelForCausalLM, folder)
    assert type(found) is kind and found.dtype == torch.bfloat16
    assert not (folder / "preprocessor_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPModel, SiglipVisionModel])
def test_a_vision_tower_comes_back(kind: type, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = exported(imported(build_tower(kind).to(dtype), tmp_path / "vision"))
    prefix = "vision_model."
    source = {
        prefix + name.removeprefix(prefix): tensor
        for name, tensor in weights(tmp_path / "vision_hf").items()
        if not name.startswith(("text_", "logit", "visual_projection", "head.", "vision_model.head."))
    }
    assert_same(weights(folder), source)
    tower = SiglipVisionModel if kind is SiglipVisionModel else CLIPVisionModel
    found = loads(tower, folder)
    assert found.dtype == dtype and found.config.architectures == [tower.__name__]
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["clip + llama", "clip + mistral", "siglip + qwen2"])
def test_a_llava_comes_back(name: str, tied: bool, tmp_path: Path) -> None:
    parts: dict[str, tuple[type, type, dict[str, Any]]] = {
        "clip + llama": (CLIPVisionConfig, LlamaConfig, {"multimodal_projector_bias": False}),
        "clip + mistral": (CLIPVisionConfig, MistralConfig, {"vision_feature_select_strategy": "full"}),
        "siglip + qwen2": (
            SiglipVisionConfig,
            Qwen2Config,
            {"vision": {"vision_use_head": False}, "vision_feature_select_strategy": "full"},
        ),
    }
    tower, language, changes = parts[name]
    text = {"tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = build_llava(tower, language, text=text, **changes).bfloat16()
    model.save_pretrained(tmp_path / "hf")
    llava.convert(llava.LlavaConfig(input=tmp_path / "hf", output=tmp_path / "model"))
    folder = exported(tmp_path / "model")
    source = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in weights(tmp_path / "hf").items()
    }
    assert_same(weights(folder), source)
    found = loads(LlavaForConditionalGeneration, folder)
    first, second = (config.to_dict() for config in (found.config, AutoConfig.from_pretrained(tmp_path / "hf")))
    for config in (first, second):
        for part in (config, config["text_config"], config["vision_config"]):
            for key in ("architectures", "_name_or_path", "transformers_version"):
                part.pop(key, None)
        for part in (config["text_config"], config["vision_config"]):
            part.pop("dtype")  # of the whole model alone in the source
        config.pop("image_seq_length")  # what the tests' builder leaves at its default
        config["text_config"].pop("sliding_window", None)
    assert first == second
    assert found.config.image_seq_length == load_architecture(tmp_path / "model").vision.num_image_embeddings


def train(layout: ParallelConfig, folder: Path) -> None:
    """One step at the learning rate 0, with which a warmup begins: an optimizer's state, and the weights as drawn."""
    model = tiny.build(layout, arch=tiny.architecture(ffn_hidden_size=tiny.LANGUAGE.hidden_size))
    model.freeze(("vision_model",))
    ddp = wrap(model)
    config = OptimizerConfig(lr_warmup_steps=2)
    optimizer = build_optimizer(config, ddp)
    batches = microbatches()
    train_step(ddp, optimizer, build_scheduler(config, optimizer, 4), iter(batches), len(batches))
    save_checkpoint(
        folder,
        1,
        model=ddp,
        optimizer=optimizer,
        architecture=model.architecture,
        tokenizer=folder / "tokenizer",
        state={},
        loader_state=None,
        keep_last=2,
    )


def test_a_run_exports_the_same_from_every_layout(tmp_path: Path) -> None:
    found = []
    for name, layout, size in (
        ("tp1", ParallelConfig(), 1),
        ("tp2", ParallelConfig(tensor_model_parallel_size=2), 2),
        ("pp2", ParallelConfig(pipeline_model_parallel_size=2), 2),
    ):
        (tmp_path / name / "tokenizer").mkdir(parents=True)
        ranks.run(train, layout, size, layout, tmp_path / name)
        convert(ExportConfig(input=tmp_path / name, output=tmp_path / f"{name}_hf"))
        found.append(weights(tmp_path / f"{name}_hf"))
        loads(LlavaForConditionalGeneration, tmp_path / f"{name}_hf")
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
