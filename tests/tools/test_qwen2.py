"""qwen2.py, against transformers' own model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import decoder
import pytest
import qwen2
import torch
from qwen2 import Qwen2Config, convert
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from mmcore.models.architecture import LanguageArch, load_architecture
from mmcore.models.presets import LANGUAGE
from tests.tools import expected, parity

Build = Callable[..., nn.Module]

# config.json as published.
QWEN25_7B_INSTRUCT: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN25_05B_INSTRUCT = {
    **QWEN25_7B_INSTRUCT,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
SMALL = replace(
    LANGUAGE["qwen25_7b_instruct"],
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=151936,
    share_embeddings_and_output_weights=True,
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QWEN25_7B_INSTRUCT, LANGUAGE["qwen25_7b_instruct"]),
        ({**QWEN25_7B_INSTRUCT, "layer_types": ["full_attention"] * 28}, LANGUAGE["qwen25_7b_instruct"]),
        (QWEN25_05B_INSTRUCT, SMALL),
    ],
)
def test_published_configurations(config: dict[str, Any], expected: LanguageArch) -> None:
    assert decoder.read_architecture(config, Path("config.json"), qwen2.FAMILY) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "a sliding window in some layers only"),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "a sliding window in some layers only"),
        ({"rope_theta": None}, "no base is assumed"),
        # As Qwen2.5's documentation has it for long texts.
        ({"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}, "is 'yarn'"),
        ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'; this converter takes 'qwen2'"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.read_architecture({**QWEN25_7B_INSTRUCT, **changes}, Path("config.json"), qwen2.FAMILY)


def config(folder: Path, **options: Any) -> Qwen2Config:
    return Qwen2Config(input=folder, output=folder.parent / "language", **options)


@pytest.mark.parametrize("is_tied", [False, True])
def test_it_computes_what_transformers_computes(
    tmp_path: Path, language: Build, read_checkpoint: Callable[[Path], dict[str, Tensor]], is_tied: bool
) -> None:
    model = language(Qwen2ForCausalLM, tie_word_embeddings=is_tied)
    model.save_pretrained(tmp_path / "hf")
    convert(config(tmp_path / "hf"))
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_tied or name != "lm_head.weight"}
    expected.assert_same(read_checkpoint(tmp_path / "language"), expected.language(state, groups=4, rows=256))
    found = load_architecture(tmp_path / "language")
    assert found.conversation == "chatml" and found.language is not None
    assert found.language.add_qkv_bias and found.language.share_embeddings_and_output_weights == is_tied
    assert parity.check(tmp_path / "language", tmp_path / "hf") < 2e-5


def test_every_bias_must_be_there(tmp_path: Path, language: Build) -> None:
    language(Qwen2ForCausalLM).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    del state["model.layers.2.self_attn.v_proj.bias"]
    state["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)
    state["model.layers.1.self_attn.o_proj.bias"] = torch.ones(64)
    save_file(state, path)
    with pytest.raises(ValueError, match=r"\(3 differences\)") as raised:
        convert(config(tmp_path / "hf"))
    for told in (
        "missing: model.layers.2.self_attn.v_proj.bias [32]",
        "wrong shape: model.layers.1.self_attn.q_proj.bias is [32], the architecture has [64]",
        "unknown: model.layers.1.self_attn.o_proj.bias [64]",
    ):
        assert told in str(raised.value)
