"""internlm2.py, against the LLaMA of transformers that computes the same: their own code is never run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import internlm2
import pytest
import torch
from decoder import weight_map
from internlm2 import InternLM2Config, convert, read_architecture
from layout import keep
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from weight_files import Header, Weights
from weight_map import apply

from mmcore.models.architecture import LanguageArch, RotaryScaling, load_architecture
from mmcore.models.presets import LANGUAGE
from tests.tools import expected, parity

State = dict[str, Tensor]
Build = Callable[..., nn.Module]

# config.json of LLaVA-MOSS2's README, whose language model is MOSS2 2.5B; the keys of its projector and tower left out.
LLAVA_MOSS2: dict[str, Any] = {
    "architectures": ["Moss2ForCausalLM"],
    "attn_implementation": "eager",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 32768,
    "model_type": "llava_moss2",
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0",
    "use_cache": True,
    "vocab_size": 137728,
}
MOSS2_ARCH = LanguageArch(
    model_type="llama",
    num_layers=32,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=137728,
    max_position_embeddings=32768,
    rotary_base=1_000_000.0,
    rotary_scaling=RotaryScaling(rope_type="dynamic", factor=2.0),
)
INTERNLM2_7B = {
    **LLAVA_MOSS2,
    "architectures": ["InternLM2ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "model_type": "internlm2",
    "num_attention_heads": 32,
    "vocab_size": 92544,
}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LLAVA_MOSS2, MOSS2_ARCH),
        ({**LLAVA_MOSS2, "model_type": "Moss2"}, MOSS2_ARCH),
        (
            INTERNLM2_7B,
            replace(MOSS2_ARCH, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, vocab_size=92544),
        ),
        ({**LLAVA_MOSS2, "rope_scaling": None}, replace(MOSS2_ARCH, rotary_scaling=None)),
        # What a missing key means to their configuration classes.
        (
            {key: LLAVA_MOSS2[key] for key in LLAVA_MOSS2 if key not in ("rope_theta", "num_key_value_heads")},
            replace(MOSS2_ARCH, rotary_base=10_000.0, num_query_groups=16),
        ),
    ],
)
def test_published_configurations(config: dict[str, Any], wanted: LanguageArch) -> None:
    assert read_architecture(config, Path("config.json")) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": True}, "bias is True; a bias on wo is not supported"),
        ({"bias": "gone"}, "bias is missing, which means true"),
        ({"model_type": "internlm"}, "model_type is 'internlm'; this converter takes internlm2, moss2, llava_moss2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in (LLAVA_MOSS2 | changes).items() if value != "gone"}
    with pytest.raises(ValueError, match=message):
        read_architecture(config, Path("config.json"))


def test_the_preset_is_what_comes_in() -> None:
    assert LANGUAGE["moss2_2_5b"] == MOSS2_ARCH


def test_the_whole_of_moss2() -> None:
    """2.5 billion parameters, counted by hand; none of them exists."""
    h, f, v, channels, heads, groups = 2048, 8192, 137728, 128, 16, 8
    shapes = {"model.tok_embeddings.weight": (v, h), "model.norm.weight": (h,), "output.weight": (v, h)}
    for layer in range(32):
        block = f"model.layers.{layer}."
        shapes |= {
            f"{block}attention.wqkv.weight": ((heads + 2 * groups) * channels, h),
            f"{block}attention.wo.weight": (h, heads * channels),
            f"{block}feed_forward.w1.weight": (f, h),
            f"{block}feed_forward.w2.weight": (h, f),
            f"{block}feed_forward.w3.weight": (f, h),
            f"{block}attention_norm.weight": (h,),
            f"{block}ffn_norm.weight": (h,),
        }
    headers = {name: Header(shape, torch.bfloat16) for name, shape in shapes.items()}
    weights = Weights(
        name="moss2", files=(), headers=headers, read=lambda name: torch.empty(shapes[name], device="meta")
    )
    arch = read_architecture(LLAVA_MOSS2, Path("config.json"))
    stored, dropped = apply(weight_map(arch, internlm2.NAMES, keep), arch.num_layers, weights)
    assert not dropped and arch.padded_vocab_size == v  # 137728 is a multiple of 128
    by_hand = 2 * v * h + 32 * (32 * channels * h + h * h + 3 * h * f + 2 * h) + h
    assert by_hand == 2_577_532_928
    assert sum(torch.Size(tensor.global_shape).numel() for tensor in stored.values()) == by_hand
    for tensor in stored.values():
        assert tuple(tensor.read(0).shape[tensor.is_stacked :]) == tensor.shape


def internlm2_state(state: State, groups: int) -> State:
    """A LLaMA's weights by InternLM2's names; per key-value head its query heads, its key, its value."""
    found = {
        "model.tok_embeddings.weight": state["model.embed_tokens.weight"],
        "model.norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(4):
        block = f"model.layers.{layer}."
        query, key, value = (state[f"{block}self_attn.{name}_proj.weight"].chunk(groups) for name in "qkv")
        wqkv = [part for group in range(groups) for part in (query[group], key[group], value[group])]
        found |= {
            f"{block}attention.wqkv.weight": torch.cat(wqkv),
            f"{block}attention.wo.weight": state[f"{block}self_attn.o_proj.weight"],
            f"{block}feed_forward.w1.weight": state[f"{block}mlp.gate_proj.weight"],
            f"{block}feed_forward.w2.weight": state[f"{block}mlp.down_proj.weight"],
            f"{block}feed_forward.w3.weight": state[f"{block}mlp.up_proj.weight"],
            f"{block}attention_norm.weight": state[f"{block}input_layernorm.weight"],
            f"{block}ffn_norm.weight": state[f"{block}post_attention_layernorm.weight"],
        }
    return found


def write(model: Any, folder: Path, **changes: Any) -> None:
    """An InternLM2 with the weights of a LLaMA."""
    folder.mkdir()
    config = {
        "model_type": "internlm2",
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "bias": False,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "tie_word_embeddings": False,
        "vocab_size": 150,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_internlm2.py").write_text("raise SystemExit('this code must never run')\n")
    state = internlm2_state(model.state_dict(), config["num_key_value_heads"])
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def config(folder: Path, **options: Any) -> InternLM2Config:
    return InternLM2Config(input=folder, output=folder.parent / "language", **options)


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}


def test_it_computes_what_a_llama_computes(
    tmp_path: Path, language: Build, read_checkpoint: Callable[[Path], State]
) -> None:
    model = language(LlamaForCausalLM, **DYNAMIC)
    model.save_pretrained(tmp_path / "llama")
    write(model, tmp_path / "internlm2")
    convert(config(tmp_path / "internlm2"))
    found = load_architecture(tmp_path / "language")
    assert found.conversation == "internlm2" and found.language is not None and found.language.model_type == "llama"
    wanted = expected.language(model.state_dict(), groups=4, rows=256)
    expected.assert_same(read_checkpoint(tmp_path / "language"), wanted)
    for reference in ("llama", "internlm2"):
        assert parity.check(tmp_path / "language", tmp_path / reference) < 2e-5


def test_without_scaling_and_groups(tmp_path: Path, language: Build) -> None:
    model = language(LlamaForCausalLM, num_key_value_heads=8)
    model.save_pretrained(tmp_path / "llama")
    write(model, tmp_path / "moss2", model_type="Moss2", rope_scaling=None, num_key_value_heads=8)
    convert(config(tmp_path / "moss2", conversation="llama2_chat"))
    assert load_architecture(tmp_path / "language").conversation == "llama2_chat"
    assert parity.check(tmp_path / "language", tmp_path / "llama") < 2e-5


def test_parts_of_a_llava_are_left_out_and_counted(tmp_path: Path, language: Build) -> None:
    folder = tmp_path / "llava"
    write(language(LlamaForCausalLM), folder, model_type="llava_moss2")
    state = load_file(folder / "model.safetensors")
    state["model.mm_projector.0.weight"] = torch.ones(2, 2)
    state["model.vision_tower.vision_tower.vision_model.post_layernorm.weight"] = torch.ones(2)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    report = convert(config(folder))
    assert "  left out 1: vision tower: clip.py converts it" in report
    assert "  left out 1: projector: combine.py takes it by --projector-weights" in report


def test_all_differing_tensors_are_named(tmp_path: Path, language: Build) -> None:
    write(language(LlamaForCausalLM), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.attention.wqkv.weight"] = torch.ones(192, 64)
    state["model.layers.0.attention.wqkv.bias"] = torch.ones(128)
    del state["output.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"\(3 differences\)") as raised:
        convert(config(tmp_path / "hf"))
    for told in (
        "wrong shape: model.layers.1.attention.wqkv.weight is [192, 64], the architecture has [128, 64]",
        "unknown: model.layers.0.attention.wqkv.bias [128]",
        "missing: output.weight [150, 64]",
    ):
        assert told in str(raised.value)
