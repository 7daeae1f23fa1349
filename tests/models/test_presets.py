"""Full-size presets have the published numbers of parameters; files say what is wrong with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmcore.config import ModelConfig, ParallelConfig
from mmcore.models.architecture import (
    RotaryScaling,
    check_layout,
    check_length,
    load_architecture,
    save_architecture,
)
from mmcore.models.llava import LlavaModel, base_config
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION, compose, resolve_architecture
from mmcore.recipes import RECIPES
from tests import ranks, tiny


def count(vision: str, language: str) -> dict[str, int]:
    arch = compose(VISION[vision], LANGUAGE[language], PROJECTOR["megatron_mlp"](LANGUAGE[language]))
    with torch.device("meta"):
        model = LlavaModel(arch, "local", **base_config(ParallelConfig()))
    return {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}


def siglip_tower(**sizes: int) -> int:
    """Parameters of transformers' own, without the pooling head, which LLaVA leaves out."""
    with torch.device("meta"):
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
    return sum(p.numel() for p in model.parameters())


# OpenAI's and open_clip's visual towers, less the projection into the contrastive space, which LLaVA leaves out.
TOWERS = {
    "clip_vit_b_16": lambda: 86_192_640 - 768 * 512,
    "clip_vit_l_14": lambda: 303_966_208 - 1024 * 768,
    "clip_vit_l_14_336": lambda: 304_293_888 - 1024 * 768,
    "clip_vit_h_14": lambda: 632_076_800 - 1280 * 1024,
    "siglip_base_patch16_224": lambda: siglip_tower(image_size=224, patch_size=16),
    "siglip_so400m_patch14_384": lambda: siglip_tower(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ),
}

# What config.json says where transformers' class has another default, and the model card's number of parameters.
SEVEN_B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
MISTRAL = {**SEVEN_B, "intermediate_size": 14336, "num_key_value_heads": 8}
LANGUAGES: dict[str, tuple[type, dict[str, int], int]] = {
    "llama2_7b": (LlamaForCausalLM, {**SEVEN_B, "intermediate_size": 11008, "vocab_size": 32000}, 6_738_415_616),
    "llama2_13b": (
        LlamaForCausalLM,
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "vocab_size": 32000,
        },
        13_015_864_320,
    ),
    "llama3_8b": (LlamaForCausalLM, {**MISTRAL, "vocab_size": 128256}, 8_030_261_248),
    "mistral_7b_v01": (MistralForCausalLM, {**MISTRAL, "vocab_size": 32000}, 7_241_732_096),
    "mistral_7b_v03": (MistralForCausalLM, {**MISTRAL, "vocab_size": 32768}, 7_248_023_552),
    "moss2_2_5b": (
        LlamaForCausalLM,
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 137728,
        },
        2_577_532_928,
    ),
    "qwen25_7b_instruct": (
        Qwen2ForCausalLM,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
}
# The same layers as another's; only what is computed with them differs.
SAME = {
    "mistral_7b_v02": "mistral_7b_v01",
    "vicuna_7b_v15": "llama2_7b",
    "vicuna_13b_v15": "llama2_13b",
    "llama31_8b": "llama3_8b",
}


@pytest.mark.parametrize("name", VISION)
def test_published_sizes_of_towers(name: str) -> None:
    counted = ranks.run(count, ParallelConfig(), 1, name, "mistral_7b_v03")[0]
    assert counted["vision_model"] == TOWERS[name]()
    assert counted["vision_projection"] == VISION[name].hidden_size * 14336 + 14336 * 4096


@pytest.mark.parametrize("name", LANGUAGE)
def test_published_sizes_of_language_models(name: str) -> None:
    kind, config, published = LANGUAGES[SAME.get(name, name)]
    with torch.device("meta"):
        theirs = kind(kind.config_class(**config, tie_word_embeddings=False))
    counted = ranks.run(count, ParallelConfig(), 1, "clip_vit_b_16", name)[0]
    assert counted["language_model"] == sum(p.numel() for p in theirs.parameters()) == published


def test_architecture_survives_its_file(tmp_path: Path) -> None:
    arch = tiny.architecture()
    save_architecture(arch, tmp_path)
    assert load_architecture(tmp_path) == arch


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a model description of this version"),
        ('{"format": 1}', "its format is 1.: convert the weights again"),
        ('{"format": 2, "vision": {"layers": 3}}', "unexpected keyword argument 'layers'"),
        ('{"format": 2, "colour": "red"}', "unexpected keyword argument 'colour'"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_architecture(tmp_path)


def test_contradiction_names_both_values(tmp_path: Path) -> None:
    save_architecture(tiny.architecture(), tmp_path)
    with pytest.raises(ValueError, match=r"num_layers: 4 in the checkpoint, 32 in the preset"):
        resolve_architecture(ModelConfig(checkpoint=str(tmp_path), language="mistral_7b_v03"))
    with pytest.raises(ValueError, match=r"'mistral_7b' is not a preset, did you mean 'mistral_7b_v03'"):
        resolve_architecture(ModelConfig(checkpoint=str(tmp_path), language="mistral_7b"))


@pytest.mark.parametrize("recipe", ["mistral_clip_pretrain", "llava15_vicuna_pretrain"])
@pytest.mark.parametrize("chosen", [{"feature_layer": -1}, {"feature_layer": -2}, {"drop_class_token": False}])
def test_the_checkpoint_chooses_its_features(recipe: str, chosen: dict[str, Any], tmp_path: Path) -> None:
    """Of the same tower Megatron-LM takes the last layer's and LLaVA those of the one before it."""
    model = replace(RECIPES[recipe]().model, checkpoint=str(tmp_path))
    whole = resolve_architecture(replace(model, checkpoint="", weights="random"))
    assert whole.vision is not None
    save_architecture(arch := replace(whole, vision=replace(whole.vision, **chosen)), tmp_path)
    assert resolve_architecture(model) == arch
    save_architecture(replace(arch, vision=replace(whole.vision, num_layers=23, **chosen)), tmp_path)
    with pytest.raises(ValueError, match=r"is for \(num_layers: 23 in the checkpoint, 24 in the preset\): take"):
        resolve_architecture(model)


def test_sequences_beyond_the_models_positions() -> None:
    arch = tiny.architecture()
    assert arch.language is not None
    check_length(arch, 128)
    with pytest.raises(ValueError, match=r"--data.seq-length 129 is beyond the 128 positions .*: give at most 128"):
        check_length(arch, 129)
    stretched = replace(arch.language, rotary_scaling=RotaryScaling(rope_type="dynamic", factor=2.0))
    check_length(replace(arch, language=stretched), 4096)


def test_layouts_that_do_not_fit() -> None:
    arch = tiny.architecture()
    with pytest.raises(ValueError, match=r"4 does not divide the key-value heads of the language model \(2\)"):
        check_layout(arch, ParallelConfig(tensor_model_parallel_size=4))
    with pytest.raises(ValueError, match=r"5 is more than the 4 layers"):
        check_layout(arch, ParallelConfig(pipeline_model_parallel_size=5))
    with pytest.raises(ValueError, match=r"3 leaves 1 of the 4 layers of the language model to 2 other stages"):
        check_layout(arch, ParallelConfig(pipeline_model_parallel_size=3, num_layers_in_first_pipeline_stage=3))
    pair, both = ParallelConfig(pipeline_model_parallel_size=2), {"num_layers_in_first_pipeline_stage": 1}
    check_layout(arch, replace(pair, **both, num_layers_in_last_pipeline_stage=3))
    with pytest.raises(ValueError, match=r"first-.*-stage 1 and --.*last-pipeline-stage 2 leaves 1 of the 4 .*none$"):
        check_layout(arch, replace(pair, **both, num_layers_in_last_pipeline_stage=2))
    with pytest.raises(ValueError, match=r"last-pipeline-stage 4 leaves 0 of the 4 .* 1 other stages: each needs 1$"):
        check_layout(arch, replace(pair, num_layers_in_last_pipeline_stage=4))
    for place in ("first", "last"):
        with pytest.raises(ValueError, match=rf"{place}.*2 with --parallel.pipeline-model-parallel-size 1"):
            ParallelConfig(**{f"num_layers_in_{place}_pipeline_stage": 2})
    with pytest.raises(ValueError, match="there is one"):
        ParallelConfig(sequence_parallel=True)
    with pytest.raises(ValueError, match=r"needs --parallel.overlap-grad-reduce"):
        ParallelConfig(overlap_param_gather=True)
    with pytest.raises(ValueError, match=r"3 ranks cannot be dealt to replicas of 2"):
        ParallelConfig(tensor_model_parallel_size=2).data_parallel_size(3)
