"""export_hf.py: what leaves is, bit for bit, what came, and transformers computes with it what we do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import clip
import combine
import export_hf
import llama
import llava
import mistral
import pytest
import qwen2
import siglip
import torch
from conversion import VerificationError
from export_hf import ExportConfig, convert
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
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
    load_architecture,
    save_architecture,
)
from mmcore.training import freezing
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import train_step
from tests import ranks, tiny
from tests.tools import parity
from tests.tools.conftest import build_language, build_llava, build_tower
from tests.training.test_layouts import microbatches

State = dict[str, Tensor]
ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tools" / "converters"
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
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
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
        config["text_config"].pop("head_dim", None)  # which Qwen2 follows where it is, and does not write
    assert first == second
    assert found.generation_config.eos_token_id == [7, 8]
    assert found.config.image_seq_length == load_architecture(tmp_path / "model").vision.num_image_embeddings


def train(layout: ParallelConfig, folder: Path) -> None:
    """One step at the learning rate 0, with which a warmup begins: an optimizer's state, and the weights as drawn."""
    model = tiny.build(layout, arch=tiny.architecture(ffn_hidden_size=tiny.LANGUAGE.hidden_size))
    freezing.freeze(model, ("vision_model",))
    ddp = wrap(model)
    config = OptimizerConfig(lr_warmup_steps=2)
    optimizer = build_optimizer(config, ddp)
    batches = microbatches()
    train_step(ddp, optimizer, build_scheduler(config, optimizer, 4), batches)
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


def test_a_run_is_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (1, 12):
        model = build_language(LlamaForCausalLM, vocab_size=100 + step)
        (tmp_path / f"run_{step}").mkdir()
        found = imported(model, tmp_path / f"run_{step}" / "language")
        shutil.copytree(found, tmp_path / "run" / f"step_{step:08d}")
    convert(ExportConfig(input=tmp_path / "run", output=tmp_path / "exported"))
    assert weights(tmp_path / "exported")["lm_head.weight"].shape[0] == 112
    with pytest.raises(ValueError, match="would replace the input"):
        convert(ExportConfig(input=tmp_path / "run", output=tmp_path / "run", overwrite=True))


@pytest.mark.parametrize("tied", [False, True])
def test_the_image_token_gets_a_row(tied: bool, tmp_path: Path) -> None:
    """Without a tokenizer the token is the model's own, which lies beyond the tables."""
    language = build_language(MistralForCausalLM, tie_word_embeddings=tied).bfloat16()
    model = joined(build_tower(CLIPVisionModel), language, tmp_path)
    folder = exported(model)
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (150, 192)
    found, source = weights(folder), weights(tmp_path / "language_hf")
    names = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name in names:
        table, own = found[f"language_model.{name}"], source[name]
        assert table.shape == (192, 64) and table[:150].equal(own)
        mean = own.double().mean(0)
        torch.testing.assert_close(table[150:].double(), mean.expand(42, -1), rtol=2**-8, atol=1e-6)
        assert (table[150:] == table[150]).all()
    rest = {name: tensor for name, tensor in source.items() if name not in names}
    assert_same({name: found[f"language_model.{name}"] for name in rest}, rest)
    # What is generated does not change: a mean is never the largest.
    transformed = loads(LlavaForConditionalGeneration, folder).float()
    tokens = torch.randint(0, 150, (4, 50), generator=torch.Generator().manual_seed(0))
    assert (transformed(tokens).logits.argmax(-1) < 150).all()


def test_dtypes(tmp_path: Path) -> None:
    tower, language = build_tower(CLIPVisionModel).half(), build_language(MistralForCausalLM).bfloat16()
    model = joined(tower, language, tmp_path)
    report = convert(ExportConfig(input=model, output=tmp_path / "kept"))
    assert any("several dtypes are loaded as float32" in line for line in report)
    kinds = {name.split(".")[0]: tensor.dtype for name, tensor in weights(tmp_path / "kept").items()}
    assert kinds == {
        "vision_tower": torch.float16,
        "multi_modal_projector": torch.float32,
        "language_model": torch.bfloat16,
    }
    assert loads(LlavaForConditionalGeneration, tmp_path / "kept").dtype == torch.float32
    with pytest.raises(ValueError, match="range lost") as caught:
        convert(ExportConfig(input=model, output=tmp_path / "half", dtype="float16"))
    assert "language_model.output_layer.weight" in str(caught.value)
    assert "vision_projection.encoder.linear_fc1.weight" in str(caught.value)
    convert(ExportConfig(input=model, output=tmp_path / "one", dtype="bfloat16"))
    assert {tensor.dtype for tensor in weights(tmp_path / "one").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        assert part["dtype"] == part["torch_dtype"] == "bfloat16"


def test_parts_of_a_whole(tmp_path: Path) -> None:
    model = joined(build_tower(SiglipVisionModel), build_language(Qwen2ForCausalLM), tmp_path)
    for part, source, kind in (
        ("vision", "vision_hf", SiglipVisionModel),
        ("language", "language_hf", Qwen2ForCausalLM),
    ):
        folder = tmp_path / f"only_{part}"
        convert(ExportConfig(input=model, output=folder, part=part))
        wanted = weights(tmp_path / source)
        if part == "vision":
            own = {name: tensor for name, tensor in wanted.items() if not name.startswith("head.")}
            wanted = {f"vision_model.{name}": tensor for name, tensor in own.items()}
        assert_same(weights(folder), wanted)
        loads(kind, folder)
    with pytest.raises(ValueError, match=r"--verify compares all .* leave it out with --part language"):
        convert(ExportConfig(input=model, output=tmp_path / "x", part="language", verify=True))
    with pytest.raises(ValueError, match=r"--part vision: .*language has none, only language"):
        convert(ExportConfig(input=tmp_path / "language", output=tmp_path / "x", part="vision"))
    with pytest.raises(ValueError, match=r"--part llava: .*vision has none, only vision"):
        convert(ExportConfig(input=tmp_path / "vision", output=tmp_path / "x", part="llava"))


@pytest.mark.parametrize("projector", ["linear", "megatron_mlp"])
def test_projectors_that_llava_does_not_have(projector: Any, tmp_path: Path) -> None:
    vision = imported(build_tower(CLIPVisionModel), tmp_path / "vision")
    language = imported(build_language(MistralForCausalLM), tmp_path / "language")
    options = {"vision": vision, "language": language, "output": tmp_path / "model", "projector": projector}
    combine.convert(combine.CombineConfig(**options))
    with pytest.raises(ValueError, match=r"one linear layer|two layers, 96 wide inside") as caught:
        exported(tmp_path / "model")
    assert "--part language" in str(caught.value) and "mlp2x_gelu" in str(caught.value)
    assert exported(tmp_path / "model", part="language").is_dir()


def test_differences_of_all_parts_are_told_at_once(tmp_path: Path) -> None:
    model = joined(build_tower(CLIPVisionModel), build_language(MistralForCausalLM), tmp_path)
    architecture = load_architecture(model)
    assert architecture.vision is not None and architecture.language is not None
    wrong = replace(
        architecture,
        vision=replace(architecture.vision, num_layers=3),
        language=replace(architecture.language, share_embeddings_and_output_weights=True),
    )
    save_architecture(wrong, model)
    with pytest.raises(ValueError, match=f"{model} does not hold the tensors") as caught:
        exported(model)
    assert "unknown: language_model.output_layer.weight" in str(caught.value)
    assert "wrong shape: vision_model.decoder.layers.mlp.linear_fc1.bias is [4, 96]" in str(caught.value)


def test_inputs_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint and holds none"):
        convert(ExportConfig(input=tmp_path, output=tmp_path / "out"))
    with pytest.raises(ValueError, match="--max-shard-size-gb must be above 0"):
        ExportConfig(input=tmp_path, output=tmp_path / "out", max_shard_size_gb=0)


def test_only_exports_are_replaced(tmp_path: Path) -> None:
    model = imported(build_language(LlamaForCausalLM), tmp_path / "language")
    for options in ({}, {"max_shard_size_gb": 1e-5}):
        folder = exported(model, overwrite=True, **options)
        (folder / "mark").touch()
        with pytest.raises(ValueError, match=r"holds an export: .*--overwrite"):
            exported(model)
        assert (folder / "mark").exists()
        exported(model, overwrite=True)
        assert not (folder / "mark").exists()
    for taken in (imported(build_tower(CLIPVisionModel), tmp_path / "vision"), tmp_path):
        with pytest.raises(ValueError, match=r"is not an export|would replace the input"):
            convert(ExportConfig(input=model, output=taken, overwrite=True))
    (tmp_path / "config.json").touch()
    assert not export_hf.is_export(tmp_path)


def test_dry_run_tells_every_tensor_and_writes_nothing(tmp_path: Path) -> None:
    model = joined(build_tower(CLIPVisionModel), build_language(MistralForCausalLM), tmp_path)
    before = sorted(tmp_path.iterdir())
    lines = convert(ExportConfig(input=model, output=tmp_path / "out", dry_run=True, max_shard_size_gb=1e-4))
    assert sorted(tmp_path.iterdir()) == before
    convert(ExportConfig(input=model, output=tmp_path / "out", max_shard_size_gb=1e-4))
    written = {
        f"{path.name}: {name} {list(tensor.shape)} float32"
        for path in (tmp_path / "out").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert {line.split(" <- ")[0] for line in lines if " <- " in line} == written
    layer = "language_model.decoder.layers.self_attention.linear_qkv.weight[2], query, key and value by group"
    assert any(line.endswith(f"model.layers.2.self_attn.k_proj.weight [32, 64] float32 <- {layer}") for line in lines)
    assert any("lm_head.weight [192, 64]" in line and line.endswith("and 42 rows of their mean") for line in lines)
    assert "config.json" in lines and lines[-1].startswith("nothing was written (--dry-run); 114 tensors")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    model = imported(build_language(LlamaForCausalLM), tmp_path / "language")
    file = model / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    for place in range(0, len(content), 1000):
        content[place : place + 8] = bytes(8)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        exported(model)
    assert {path.name for path in tmp_path.iterdir()} == {"language", "language_hf"}


def test_what_differs_from_the_checkpoint_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--verify compares before the folder gets its name."""
    model = imported(build_language(LlamaForCausalLM), tmp_path / "language")
    seen = []

    def refuse(checkpoint: Path, *references: Path) -> list[str]:
        seen.append((checkpoint, [set(weights(folder)) for folder in references]))
        raise VerificationError("layer 3 differs")

    monkeypatch.setattr(export_hf, "verify", refuse)
    with pytest.raises(VerificationError):
        exported(model, verify=True)
    assert seen == [(model, [set(weights(tmp_path / "language_hf"))])]
    assert {path.name for path in tmp_path.iterdir()} == {"language", "language_hf"}
