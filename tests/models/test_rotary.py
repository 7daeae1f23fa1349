"""Rotary frequencies against transformers' LLaMA, to the bit, and cached generation where they grow."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mmcore.config import ParallelConfig
from mmcore.inference.generator import Prompt, generate
from mmcore.models.architecture import LanguageArch, RotaryScaling
from mmcore.models.cache import KeyValueCache
from mmcore.models.rotary import ScaledRotaryEmbedding, inverse_frequencies
from tests import ranks, tiny

TRAINED = 48
SCALINGS = {
    "none": None,
    "linear": RotaryScaling(rope_type="linear", factor=4.0),
    "dynamic": RotaryScaling(rope_type="dynamic", factor=2.0),
    "dynamic by 1.5": RotaryScaling(rope_type="dynamic", factor=1.5),
    "LLaMA 3.1": RotaryScaling(rope_type="llama3", factor=8.0),
    "LLaMA 3.2": RotaryScaling(rope_type="llama3", factor=32.0),
    "all bands": RotaryScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=TRAINED,
    ),
}


def architecture(scaling: RotaryScaling | None, channels: int = 16, base: float = 1e4) -> LanguageArch:
    return replace(
        tiny.LANGUAGE,
        kv_channels=channels,
        rotary_base=base,
        rotary_scaling=scaling,
        max_position_embeddings=TRAINED,
    )


def original_config(arch: LanguageArch) -> LlamaConfig:
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rotary_base}
    if scaling := arch.rotary_scaling:
        parameters |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
        if scaling.rope_type == "llama3":
            names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            parameters |= {name: getattr(scaling, name) for name in names}
    return LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_query_groups,
        head_dim=arch.kv_channels,
        max_position_embeddings=arch.max_position_embeddings,
        rms_norm_eps=arch.layernorm_epsilon,
        rope_parameters=parameters,
    )


def original_frequencies(arch: LanguageArch, length: int) -> Tensor:
    rotary = LlamaRotaryEmbedding(original_config(arch))
    rotary(torch.zeros(1), torch.arange(length)[None])
    return rotary.inv_freq


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("channels", [8, 64, 128])
@pytest.mark.parametrize("base", [1e4, 5e5, 1e6])
def test_frequencies_are_those_of_transformers(name: str, channels: int, base: float) -> None:
    arch = architecture(SCALINGS[name], channels, base)
    for length in (1, TRAINED - 1, TRAINED, TRAINED + 1, TRAINED + 7, 3 * TRAINED):
        assert torch.equal(inverse_frequencies(arch, length), original_frequencies(arch, length)), length


def test_every_scaling_changes_something() -> None:
    found = [inverse_frequencies(architecture(scaling, 128, 5e5), 2 * TRAINED) for scaling in SCALINGS.values()]
    for number, frequencies in enumerate(found):
        assert not any(torch.equal(frequencies, other) for other in found[:number])
    plain, banded = (inverse_frequencies(architecture(SCALINGS[name], 128), 1) for name in ("none", "all bands"))
    kept, stretched = (banded == plain).sum(), (banded == plain / 8).sum()
    assert kept > 0 and stretched > 0 and kept + stretched < 64, "of the three bands one is empty"


def test_angles_follow_the_length_both_ways() -> None:
    """Growing, shrinking and growing again: nothing of an earlier length stays."""
    arch = architecture(SCALINGS["dynamic"])
    rotary = ScaledRotaryEmbedding(arch, use_cpu_initialization=True)
    for length in (TRAINED - 8, 2 * TRAINED, TRAINED, 2 * TRAINED, 3 * TRAINED, 5):
        half = torch.arange(length)[:, None] * original_frequencies(arch, length)
        assert torch.equal(rotary(length)[:, 0, 0], torch.cat((half, half), dim=1)), length


def split_qkv(weight: Tensor) -> tuple[Tensor, ...]:
    """mcore's rows [group: its two queries, its key, its value], 16 channels each, as three matrices."""
    heads = weight.split(16)
    query = [head for group in range(2) for head in heads[4 * group : 4 * group + 2]]
    return torch.cat(query), torch.cat([heads[2], heads[6]]), torch.cat([heads[3], heads[7]])


def as_original(state: dict[str, Tensor], arch: LanguageArch) -> LlamaForCausalLM:
    """transformers' model with the weights of one of ours."""
    weights = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"][: arch.vocab_size],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
        "lm_head.weight": state["output_layer.weight"][: arch.vocab_size],
    }
    for layer in range(arch.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, part in zip("qkv", split_qkv(state[f"{ours}self_attention.linear_qkv.weight"]), strict=True):
            weights[f"{theirs}self_attn.{name}_proj.weight"] = part
        gate, up = state[f"{ours}mlp.linear_fc1.weight"].split(arch.ffn_hidden_size)
        weights |= {
            f"{theirs}self_attn.o_proj.weight": state[f"{ours}self_attention.linear_proj.weight"],
            f"{theirs}input_layernorm.weight": state[f"{ours}input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": state[f"{ours}pre_mlp_layernorm.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": state[f"{ours}mlp.linear_fc2.weight"],
        }
    model = LlamaForCausalLM(original_config(arch)).eval()
    model.load_state_dict(weights)
    return model


TOKENS = torch.randint(0, 150, (2, 72), generator=torch.Generator().manual_seed(3))
DYNAMIC = architecture(SCALINGS["dynamic"])
# Tokens of the prompt: the cache passes the 48 positions on its way, or begins beyond them.
PROMPTS = (44, 56)
NEW = 12


@torch.no_grad()
def cached_logits(prompt: int, arch: LanguageArch) -> tuple[dict[str, Tensor], Tensor]:
    """Weights, and logits [steps, b, v] after the prompt and after each of the tokens that follow."""
    model = tiny.build(ParallelConfig(), arch=replace(tiny.architecture(), language=arch)).eval()
    cache = KeyValueCache(2, 80)  # with room for tokens that never come
    found = []
    for first, last in [(0, prompt), *((n, n + 1) for n in range(prompt, prompt + NEW))]:
        cache.begin([] if first else [prompt, prompt])
        row = TOKENS[:, first:last].reshape(1, -1)
        found.append(model(row, positions=cache.last, inference_context=cache))
    return model.language_model.state_dict(), torch.stack(found)


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_a_cache_is_rotated_as_transformers_rotates_the_whole(prompt: int) -> None:
    """Keys that are kept get the frequencies of the length that is reached.

    transformers' own cache keeps them at those of their time, so it is left out here. In deeper layers
    no cache gives what the whole sequence would: its values are of an earlier length.
    """
    arch = replace(DYNAMIC, num_layers=1)
    state, found = ranks.run(cached_logits, ParallelConfig(), 1, prompt, arch)[0]
    texts = [TOKENS[:, :length] for length in range(prompt, prompt + NEW + 1)]
    original = as_original(state, arch)
    expected = torch.stack([original(text, use_cache=False).logits[:, -1] for text in texts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    unscaled = as_original(state, replace(arch, rotary_scaling=None))(texts[-1]).logits[:, -1]
    assert (unscaled - expected[-1]).abs().max() > 1e-3 * expected.abs().max(), "the scaling changes nothing here"


@torch.no_grad()
def test_a_cache_of_trained_positions_is_that_of_transformers() -> None:
    prompt, total = 20, 20 + NEW
    state, found = ranks.run(cached_logits, ParallelConfig(), 1, prompt, DYNAMIC)[0]
    original, cache, expected = as_original(state, DYNAMIC), None, []
    for first, last in [(0, prompt), *((n, n + 1) for n in range(prompt, total))]:
        output = original(TOKENS[:, first:last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        expected.append(output.logits[:, -1])
    wanted = torch.stack(expected)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def generated(layout: ParallelConfig) -> list[list[int]]:
    model = tiny.build(layout, arch=replace(tiny.architecture(), language=DYNAMIC))
    none = torch.empty(0, 3, 16, 16, dtype=torch.uint8)
    prompts = [Prompt(tokens=row[:prompt].tolist(), images=none) for row in TOKENS for prompt in PROMPTS]
    return generate(model, prompts, max_new_tokens=NEW, batch_size=4)


def test_every_layout_generates_the_same() -> None:
    """Later pipeline stages know the length too."""
    expected = ranks.run(generated, ParallelConfig(), 1, ParallelConfig())[0]
    assert len({tuple(answer) for answer in expected}) > 2, "all answers are alike: the test would see nothing"
    for layout in (ParallelConfig(tensor_model_parallel_size=2), ParallelConfig(pipeline_model_parallel_size=2)):
        assert all(found == expected for found in ranks.run(generated, layout, 2, layout))
