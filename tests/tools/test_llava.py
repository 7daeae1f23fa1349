"""llava.py on the hub's llava-hf folders, against transformers' own class."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llava import LlavaConfig, convert, plan, read_architecture
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

from mmcore.models.architecture import Architecture, LanguageArch, ProjectorArch, VisionArch, load_architecture
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION
from tests.tools import expected, parity
from tests.tools.expected import assert_same, without_prefix

State = dict[str, Tensor]
Build = Callable[..., torch.nn.Module]

COMPOSITIONS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "clip + llama": (CLIPVisionConfig, LlamaConfig, {}),
    "clip + mistral": (CLIPVisionConfig, MistralConfig, {"text": {"sliding_window": 12}}),
    "siglip + qwen2": (
        SiglipVisionConfig,
        Qwen2Config,
        {
            "vision": {"image_size": 36, "vision_use_head": False},
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
    ),
}
VISION_ARCH = VisionArch(
    num_layers=4, hidden_size=48, ffn_hidden_size=96, num_attention_heads=8, image_size=32, patch_dim=8
)
LANGUAGE_ARCH = LanguageArch(
    model_type="llama",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=160,
    max_position_embeddings=128,
    rotary_base=20000.0,
)


def config(folder: Path, **options: object) -> LlavaConfig:
    return LlavaConfig(input=folder, output=folder.parent / "model", **options)


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


@pytest.fixture
def folder(tmp_path: Path, llava: Build) -> Path:
    llava(CLIPVisionConfig, LlamaConfig).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def expected_model(state: State) -> State:
    """From the names that transformers 5 has in memory."""
    text = {f"model.{name}": tensor for name, tensor in without_prefix(state, "model.language_model.").items()}
    between = without_prefix(state, "model.multi_modal_projector.linear_")
    return {
        **expected.tower(without_prefix(state, "model.vision_tower."), heads=8),
        **expected.language(text | {"lm_head.weight": state["lm_head.weight"]}, groups=4, rows=256),
        **{f"vision_projection.encoder.linear_fc{name}": tensor for name, tensor in between.items()},
    }


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_tensor(tmp_path: Path, llava: Build, read_checkpoint: Callable[[Path], State], name: str) -> None:
    tower, language, changes = COMPOSITIONS[name]
    model = llava(tower, language, **changes)
    model.save_pretrained(tmp_path / "hf")
    report = convert(config(tmp_path / "hf"))
    assert_same(read_checkpoint(tmp_path / "model"), expected_model(model.state_dict()))
    found = load_architecture(tmp_path / "model")
    assert found.image_token_id == 150 and found.vision is not None and found.language is not None
    assert found.vision_projection == ProjectorArch(ffn_hidden_size=64)
    assert any("image token 150, in the vocabulary; 16 for each image" in line for line in report)
    wanted = {
        "clip + llama": (VISION_ARCH, LANGUAGE_ARCH, "vicuna_v1"),
        "clip + mistral": (
            VISION_ARCH,
            replace(LANGUAGE_ARCH, model_type="mistral", sliding_window=12),
            "mistral_instruct",
        ),
        "siglip + qwen2": (
            replace(
                VISION_ARCH,
                model_subtype="siglip",
                image_size=36,
                activation="gelu_tanh",
                layernorm_epsilon=1e-6,
                feature_layer=-1,
                image_mean=(0.5, 0.5, 0.5),
                image_std=(0.5, 0.5, 0.5),
            ),
            replace(LANGUAGE_ARCH, model_type="qwen2", add_qkv_bias=True),
            "chatml",
        ),
    }
    assert (found.vision, found.language, found.conversation) == wanted[name]


def test_names_of_all_versions(folder: Path, llava: Build, read_checkpoint: Callable[[Path], State]) -> None:
    """The hub's have "vision_model." and a buffer; those in memory begin with "model."."""
    path = folder / "model.safetensors"
    written = load_file(path)
    tower, hub = "vision_tower.", "vision_tower.vision_model."
    older = {name.replace(tower, hub): tensor for name, tensor in written.items()}
    older |= {f"{hub}embeddings.position_ids": torch.arange(17)[None]}
    older |= {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    memory = {name: tensor.clone() for name, tensor in llava(CLIPVisionConfig, LlamaConfig).state_dict().items()}
    assert len({tuple(sorted(names)) for names in (written, older, memory)}) == 3
    found = []
    for state in (written, older, memory):
        save_file(state, path)
        convert(config(folder, overwrite=True))
        found.append(read_checkpoint(folder.parent / "model"))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_projector_and_features_by_the_configuration(
    tmp_path: Path, llava: Build, read_checkpoint: Callable[[Path], State]
) -> None:
    changes = {"multimodal_projector_bias": False, "projector_hidden_act": "gelu_pytorch_tanh"}
    features = {"vision_feature_layer": 3, "vision_feature_select_strategy": "full"}  # of 0 to 4
    model = llava(CLIPVisionConfig, LlamaConfig, **changes, **features)
    model.save_pretrained(tmp_path / "hf")
    convert(config(tmp_path / "hf", conversation="plain"))
    found = load_architecture(tmp_path / "model")
    assert found.vision == replace(VISION_ARCH, feature_layer=-2, drop_class_token=False)
    assert found.vision_projection == ProjectorArch(ffn_hidden_size=64, add_bias_linear=False, activation="gelu_tanh")
    assert found.conversation == "plain"
    assert "vision_projection.encoder.linear_fc1.bias" not in read_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("where", ["text_config", "top"])
def test_tied_embeddings(tmp_path: Path, llava: Build, read_checkpoint: Callable[[Path], State], where: str) -> None:
    tie = {"tie_word_embeddings": True}
    changes = {"text": tie} if where == "text_config" else tie
    llava(CLIPVisionConfig, Qwen2Config, **changes).save_pretrained(tmp_path / "hf")
    assert not any("lm_head" in name for name in load_file(tmp_path / "hf" / "model.safetensors"))
    convert(config(tmp_path / "hf"))
    assert "language_model.output_layer.weight" not in read_checkpoint(tmp_path / "model")
    language = load_architecture(tmp_path / "model").language
    assert language is not None and language.share_embeddings_and_output_weights


def test_the_vocabulary_of_llama_3_tells_the_conversation(tmp_path: Path, llava: Build) -> None:
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    llava(CLIPVisionConfig, LlamaConfig, text={**small, "vocab_size": 128_320}).save_pretrained(tmp_path / "hf")
    assert plan(config(tmp_path / "hf")).architecture.conversation == "llama3"


def test_files_that_go_along(folder: Path) -> None:
    names = {"tokenizer_config.json", "chat_template.jinja", "processor_config.json", "preprocessor_config.json"}
    for name in (*names, "README.md", "training_args.bin"):
        (folder / name).write_text("{}")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    convert(config(folder))
    assert {path.name for path in (folder.parent / "model" / "tokenizer").iterdir()} == {
        *names,
        "generation_config.json",
    }
    vision = load_architecture(folder.parent / "model").vision
    assert vision is not None and (vision.image_mean, vision.image_std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


# config.json of llava-hf/llava-1.5-7b-hf: the language model's width, layers and heads are LlamaConfig's defaults.
HUB_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def test_the_hubs_configuration(tmp_path: Path) -> None:
    language = replace(LANGUAGE["vicuna_7b_v15"], vocab_size=32064)
    assert read_architecture(HUB_7B, tmp_path / "config.json") == Architecture(
        vision=VISION["clip_vit_l_14_336"],
        vision_projection=PROJECTOR["mlp2x_gelu"](language),
        language=language,
        image_token_id=32000,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "text_config": {"model_type": "gemma"},
                "vision_config": {"model_type": "pixtral"},
                "vision_feature_layer": [-2, -5],
                "vision_feature_select_strategy": "most",
                "projector_hidden_act": "relu",
            },
            r"of a 'gemma', known are llama, mistral, qwen2; .*of a 'pixtral', known are clip_vision_model, siglip_.*; "
            r"vision_feature_layer is \[-2, -5\].*; vision_feature_select_strategy is 'most'.*; projector_.* 'relu'",
        ),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'default' drops SigLIP's first patch"),
        ({"text_config": {"model_type": "llama", "hidden_size": "64"}}, "not a configuration that transformers takes"),
        ({"text_config": {"model_type": "llama", "attention_bias": True}}, "attention_bias is true"),
        ({"vision_feature_layer": 0}, "feature_layer -5 must lie between -4 and -1"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised weights cannot be converted"),
        ({"model_type": "llava_next"}, "grid pinpoint 336x672 is not made of whole squares of 32 pixels"),
        ({"model_type": "llava_onevision"}, "'llava_onevision' is not supported: it cuts pictures into tiles"),
        ({"model_type": "paligemma"}, "model_type is 'paligemma' and there is no mm_vision_tower"),
        ({"image_token_index": "<image>"}, "not a configuration that transformers takes"),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, changes: dict[str, object], message: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert(config(folder))
    assert not (folder.parent / "model").exists()


def test_a_folder_that_holds_its_tower_takes_no_other(folder: Path) -> None:
    with pytest.raises(ValueError, match="leave out --vision-tower"):
        convert(config(folder, vision_tower=folder))


def test_the_differences_of_all_parts_are_told_at_once(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["vision_tower.pre_layrnorm.bias"], state["language_model.model.norm.weight"]
    state["multi_modal_projector.linear_2.bias"] = torch.ones(63)
    state |= {"image_newline": torch.ones(64), "language_model.model.layers.4.mlp.up_proj.weight": torch.ones(96, 64)}
    state["language_model.model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.uint8)
    save_file(state, path)
    with pytest.raises(ValueError, match="6 differences") as raised:
        convert(config(folder))
    for told in (
        "missing: vision_tower.vision_model.pre_layrnorm.bias [48]",
        "missing: language_model.model.norm.weight [64]",
        "wrong shape: multi_modal_projector.linear_2.bias is [63], the architecture has [64]",
        "unknown: image_newline [64]",
        "unknown: language_model.model.layers.4.mlp.up_proj.weight [96, 64]",
        "wrong dtype: language_model.model.layers.0.mlp.up_proj.weight is torch.uint8",
    ):
        assert told in str(raised.value)
    assert not (folder.parent / "model").exists()


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_parity(tmp_path: Path, llava: Build, name: str) -> None:
    tower, language, changes = COMPOSITIONS[name]
    llava(tower, language, **changes).save_pretrained(tmp_path / "hf")
    convert(config(tmp_path / "hf"))
    parity.check(tmp_path / "model", tmp_path / "hf")


def test_parity_with_the_class_token_and_another_layer(tmp_path: Path, llava: Build) -> None:
    changes = {"vision_feature_layer": 2, "vision_feature_select_strategy": "full", "multimodal_projector_bias": False}
    llava(CLIPVisionConfig, LlamaConfig, **changes).save_pretrained(tmp_path / "hf")
    convert(config(tmp_path / "hf"))
    parity.check(tmp_path / "model", tmp_path / "hf")
