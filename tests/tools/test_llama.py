"""llama.py, against transformers' own model; and decoder.py's configurations."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import decoder
import llama
import pytest
import torch
from llama import LlamaConfig, convert
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mmcore.models.architecture import LanguageArch, RotaryScaling, load_architecture
from mmcore.models.presets import LANGUAGE
from tests.tools import parity

State = dict[str, Tensor]
Build = Callable[..., nn.Module]

# config.json as published; keys that every one of them has, or that say nothing of the architecture, are left out.
COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "use_cache": True,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
LLAMA2_7B = {
    **COMMON,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rope_scaling": None,
    "vocab_size": 32000,
}
LLAMA3_8B = {
    **COMMON,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA31_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31_8B = {**LLAMA3_8B, "max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": LLAMA31_SCALING}
LLAMA32_1B = {
    **LLAMA31_8B,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA31_SCALING, "factor": 32.0},
    "tie_word_embeddings": True,
}
LINEAR = RotaryScaling(rope_type="linear", factor=4.0)
LLAMA32 = RotaryScaling(rope_type="llama3", factor=32.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA2_7B, LANGUAGE["llama2_7b"]),
        # The first LLaMAs had no groups, and said nothing of them.
        ({key: LLAMA2_7B[key] for key in LLAMA2_7B if key != "num_key_value_heads"}, LANGUAGE["llama2_7b"]),
        ({**LLAMA2_7B, "_name_or_path": "vicuna-7b-v1.5", "pad_token_id": 0}, LANGUAGE["vicuna_7b_v15"]),
        # vicuna-7b-v1.5-16k
        (
            {**LLAMA2_7B, "rope_scaling": {"factor": 4.0, "type": "linear"}},
            replace(LANGUAGE["llama2_7b"], rotary_scaling=LINEAR),
        ),
        (LLAMA3_8B, LANGUAGE["llama3_8b"]),
        (LLAMA31_8B, LANGUAGE["llama31_8b"]),
        (
            LLAMA32_1B,
            replace(
                LANGUAGE["llama31_8b"],
                num_layers=16,
                hidden_size=2048,
                ffn_hidden_size=8192,
                kv_channels=64,
                rotary_scaling=LLAMA32,
                share_embeddings_and_output_weights=True,
            ),
        ),
        # As transformers 5 writes them.
        (
            {**LLAMA2_7B, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
            LANGUAGE["llama2_7b"],
        ),
        (
            {**LLAMA31_8B, "rope_scaling": None, "rope_parameters": {**LLAMA31_SCALING, "rope_theta": 500000.0}},
            LANGUAGE["llama31_8b"],
        ),
    ],
)
def test_published_configurations(config: dict[str, Any], expected: LanguageArch) -> None:
    assert decoder.read_architecture(config, Path("config.json"), llama.FAMILY) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"num_attention_heads": 33}, "hidden_size 4096 is not a multiple of num_attention_heads 33"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "a sliding window in some layers only"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor asks to rotate some channels only"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "rope_type is 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' must be a number above 0 \\(float\\), not None"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": "2"}},
            "'factor' must be a number above 0 \\(float\\), not '2'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "'factor' must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "must be at least 1, not 0.5"),
        ({"rope_scaling": [4.0]}, "must hold names and values, not \\[4.0\\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "'high_freq_factor' must"),
        (
            {"rope_scaling": {**LLAMA31_SCALING, "original_max_position_embeddings": None}},
            "'original_max_position_embeddings' must be a number above 0",
        ),
        ({"rope_scaling": {**LLAMA31_SCALING, "high_freq_factor": 1.0}}, "below high_freq_factor 1.0"),
        ({"rope_theta": -1.0}, "no base is assumed"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' must be a number"),
        ({"vocab_size": 1e3}, "'vocab_size' must be a number above 0 \\(int\\)"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.read_architecture({**LLAMA2_7B, **changes}, Path("config.json"), llama.FAMILY)


def config(folder: Path, **options: Any) -> LlamaConfig:
    return LlamaConfig(input=folder, output=folder.parent / "language", **options)


def rope(kind: str, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "changes",
    [
        rope("default") | {"num_key_value_heads": 8},
        rope("linear", factor=4.0),
        rope("dynamic", factor=2.0),
        rope("llama3", factor=8.0, **LLAMA3),
        rope("llama3", factor=32.0, **LLAMA3) | {"tie_word_embeddings": True, "head_dim": 16},
    ],
    ids=["LLaMA 2", "linear", "dynamic", "LLaMA 3.1", "LLaMA 3.2"],
)
def test_it_computes_what_transformers_computes(tmp_path: Path, language: Build, changes: dict[str, Any]) -> None:
    language(LlamaForCausalLM, **changes).save_pretrained(tmp_path / "hf")
    convert(config(tmp_path / "hf"))
    assert parity.check(tmp_path / "language", tmp_path / "hf") < 2e-5


def write_bin_shards(state: State, folder: Path) -> None:
    """As transformers wrote them: an index, and every third tensor in another file."""
    names = [f"pytorch_model-{number:05}-of-00003.bin" for number in (1, 2, 3)]
    places = {name: names[number % 3] for number, name in enumerate(state)}
    for place in names:
        torch.save({name: state[name] for name in state if places[name] == place}, folder / place)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("form", ["safetensors shards", "bin shards"])
def test_every_form_gives_the_same(
    tmp_path: Path, language: Build, read_checkpoint: Callable[[Path], State], form: str
) -> None:
    model = language(LlamaForCausalLM).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    convert(replace(config(tmp_path / "whole"), output=tmp_path / "expected"))
    expected = read_checkpoint(tmp_path / "expected")
    folder = tmp_path / "hf"
    model.save_pretrained(folder, max_shard_size="20KB")
    if form == "bin shards":
        state = model.state_dict()
        for layer in range(4):  # as older versions kept them
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        for path in folder.glob("model*"):
            path.unlink()
        write_bin_shards(state, folder)
    report = convert(config(folder))
    assert ("  left out 4: computed from the rotary base" in report) == (form == "bin shards")
    found = read_checkpoint(tmp_path / "language")
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == torch.bfloat16 and torch.equal(found[key], expected[key]) for key in found)
    assert len(load_architecture(tmp_path / "language").sources) == len(list(folder.glob("*-of-*"))) > 1


def test_tied_tables_must_be_equal(tmp_path: Path, language: Build) -> None:
    model = language(LlamaForCausalLM, tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path / "hf")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in state
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    assert "  left out 1: tied: the embedding takes its place" in convert(config(tmp_path / "hf"))
    state["lm_head.weight"][3, 5] += 1
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        convert(config(tmp_path / "hf", overwrite=True))


@pytest.mark.parametrize(
    ("held", "wanted", "fits"),
    [
        (torch.bfloat16, "float16", False),
        (torch.float32, "float16", False),
        (torch.float32, "bfloat16", True),
        (torch.float16, "bfloat16", True),
        (torch.float16, "float32", True),
    ],
)
def test_dtypes(
    tmp_path: Path,
    language: Build,
    read_checkpoint: Callable[[Path], State],
    held: torch.dtype,
    wanted: Any,
    fits: bool,
) -> None:
    language(LlamaForCausalLM).to(held).save_pretrained(tmp_path / "hf")
    if fits:
        convert(config(tmp_path / "hf", dtype=wanted))
        found = read_checkpoint(tmp_path / "language")
        assert {tensor.dtype for tensor in found.values()} == {getattr(torch, wanted)}
        return
    with pytest.raises(ValueError, match=r"\(39 differences\)") as raised:
        convert(config(tmp_path / "hf", dtype=wanted))
    assert str(raised.value).count("range lost: ") == 39
    assert f"model.norm.weight is {held}, whose largest values torch.float16 does not hold" in str(raised.value)


@pytest.mark.parametrize(
    ("vocab_size", "option", "expected"),
    [(150, "", "llama2_chat"), (128_256, "", "llama3"), (150, "vicuna_v1", "vicuna_v1"), (128_256, "plain", "plain")],
)
def test_conversations(tmp_path: Path, language: Build, vocab_size: int, option: str, expected: str) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    language(LlamaForCausalLM, vocab_size=vocab_size, **sizes).save_pretrained(tmp_path / "hf")
    assert llama.plan(config(tmp_path / "hf", conversation=option)).architecture.conversation == expected


def tokenizer_json(folder: Path, pieces: int) -> None:
    folder.mkdir(exist_ok=True)
    content = {"model": {"vocab": {f"piece {number}": number for number in range(pieces)}}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


# The first lines of LLaMA 3's file: bytes in base64 and their rank.
TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\nJA== 3\n"


def test_a_tokenizer_of_tiktoken_needs_another(tmp_path: Path, language: Build) -> None:
    folder = tmp_path / "hf"
    language(LlamaForCausalLM).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(TIKTOKEN)
    with pytest.raises(ValueError, match=r"tokenizer.model is a tokenizer of tiktoken's.*by --tokenizer"):
        convert(config(folder))
    tokenizer_json(folder, 150)
    assert [path.name for path in llama.plan(config(folder)).tokenizer] == ["tokenizer.json"]


def test_a_tokenizer_from_another_folder(tmp_path: Path, language: Build) -> None:
    folder = tmp_path / "hf"
    language(LlamaForCausalLM).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(TIKTOKEN)
    tokenizer_json(tmp_path / "elsewhere", 151)
    with pytest.raises(ValueError, match=r"elsewhere/tokenizer.json has 151 pieces"):
        convert(config(folder, tokenizer=tmp_path / "elsewhere"))
    tokenizer_json(tmp_path / "elsewhere", 150)
    convert(config(folder, tokenizer=tmp_path / "elsewhere"))
    assert [path.name for path in (tmp_path / "language" / "tokenizer").iterdir()] == ["tokenizer.json"]
    with pytest.raises(ValueError, match=r"--tokenizer .*nowhere holds no tokenizer"):
        convert(config(folder, tokenizer=tmp_path / "nowhere", overwrite=True))
    with pytest.raises(ValueError, match="would replace the input"):
        convert(replace(config(folder, tokenizer=tmp_path / "elsewhere"), output=tmp_path / "elsewhere"))


@pytest.mark.parametrize("option", ["max_position_embeddings", "rotary_scaling_factor"])
def test_what_config_json_tells_is_no_option(tmp_path: Path, language: Build, option: str) -> None:
    language(LlamaForCausalLM).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="are for Meta's own layout"):
        convert(config(tmp_path / "hf", **{option: 32}))
