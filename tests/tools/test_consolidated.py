"""Meta's and Mistral's own layout, against the Hugging Face folder of the same model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import consolidated
import llama
import mistral
import pytest
import torch
from consolidated import is_consolidated, open_consolidated
from llama import LlamaConfig
from mistral import MistralConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM

from mmcore.models.architecture import Architecture, RotaryScaling, load_architecture
from mmcore.models.presets import LANGUAGE
from tests.tools import expected, parity

State = dict[str, Tensor]
Build = Callable[..., nn.Module]
Read = Callable[[Path], State]


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Channels i and i + channels / 2 of every head next to each other."""
    channels = len(rows) // heads
    found = torch.empty_like(rows)
    for head in range(heads):
        first = head * channels
        for pair in range(channels // 2):
            found[first + 2 * pair] = rows[first + pair]
            found[first + 2 * pair + 1] = rows[first + pair + channels // 2]
    return found


def original_state(model: Any) -> State:
    """A model's weights as its makers have them."""
    state, config = model.state_dict(), model.config
    found = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
        "rope.freqs": torch.ones(config.head_dim // 2),
    }
    for layer in range(config.num_hidden_layers):
        theirs, block = f"model.layers.{layer}.", f"layers.{layer}."
        query, key = (state[f"{theirs}self_attn.{name}_proj.weight"] for name in "qk")
        found |= {
            f"{block}attention.wq.weight": interleaved(query, config.num_attention_heads),
            f"{block}attention.wk.weight": interleaved(key, config.num_key_value_heads),
            f"{block}attention.wv.weight": state[f"{theirs}self_attn.v_proj.weight"],
            f"{block}attention.wo.weight": state[f"{theirs}self_attn.o_proj.weight"],
            f"{block}feed_forward.w1.weight": state[f"{theirs}mlp.gate_proj.weight"],
            f"{block}feed_forward.w2.weight": state[f"{theirs}mlp.down_proj.weight"],
            f"{block}feed_forward.w3.weight": state[f"{theirs}mlp.up_proj.weight"],
            f"{block}attention_norm.weight": state[f"{theirs}input_layernorm.weight"],
            f"{block}ffn_norm.weight": state[f"{theirs}post_attention_layernorm.weight"],
        }
    return found


def cut(state: State, shards: int, embedding_axis: int) -> list[State]:
    """What each of Meta's model parallel ranks holds."""
    found: list[State] = [{} for _ in range(shards)]
    for name, tensor in state.items():
        if "norm" in name or name == "rope.freqs":
            pieces = [tensor.clone() for _ in range(shards)]
        elif name == "tok_embeddings.weight":
            pieces = list(tensor.chunk(shards, embedding_axis))
        elif ".wo." in name or ".w2." in name:
            pieces = list(tensor.chunk(shards, 1))
        else:
            pieces = list(tensor.chunk(shards, 0))
        for shard, piece in zip(found, pieces, strict=True):
            shard[name] = piece.clone()
    return found


LLAMA2 = {
    "dim": 64,
    "multiple_of": 32,
    "n_heads": 8,
    "n_kv_heads": 4,
    "n_layers": 4,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
LLAMA3 = {**LLAMA2, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "vocab_size": 152}
LLAMA31 = {**LLAMA3, "use_scaled_rope": True}
MISTRAL = {
    "dim": 64,
    "n_layers": 4,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 8,
    "n_kv_heads": 4,
    "norm_eps": 1e-05,
    "vocab_size": 152,
}


def write(folder: Path, params: dict[str, Any], shards: list[State], form: str = "pth") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for number, shard in enumerate(shards):
        if form == "pth":
            torch.save(shard, folder / f"consolidated.{number:02}.pth")
        else:
            save_file(shard, folder / "consolidated.safetensors")


def rope(kind: str, base: float, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **parameters}, "vocab_size": 152}


SCALED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Makers' configuration, what of Hugging Face's differs from build_language's, options.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "LLaMA 2": (LLAMA2, rope("default", 10000.0) | {"max_position_embeddings": 4096}, {}),
    "LLaMA 2 without groups": (
        {key: LLAMA2[key] for key in LLAMA2 if key != "n_kv_heads"},
        rope("default", 10000.0) | {"max_position_embeddings": 4096, "num_key_value_heads": 8},
        {},
    ),
    "Code Llama": (
        {**LLAMA2, "rope_theta": 1000000, "vocab_size": 152},
        rope("default", 1e6) | {"max_position_embeddings": 16384},
        {"max_position_embeddings": 16384},
    ),
    "LLaMA 3": (LLAMA3, rope("default", 500000.0) | {"max_position_embeddings": 8192}, {}),
    "LLaMA 3.1": (
        {**LLAMA31, "rope_scaling_factor": 8.0},
        rope("llama3", 500000.0, factor=8.0, **SCALED) | {"max_position_embeddings": 131072},
        {},
    ),
    "LLaMA 3.2": (
        LLAMA31,
        rope("llama3", 500000.0, factor=32.0, **SCALED)
        | {"max_position_embeddings": 131072, "tie_word_embeddings": True},
        {"rotary_scaling_factor": 32.0},
    ),
    "Mistral v0.1": (
        {**MISTRAL, "sliding_window": 24},
        rope("default", 10000.0) | {"max_position_embeddings": 32768, "head_dim": 16, "sliding_window": 24},
        {},
    ),
    "Mistral v0.2": (MISTRAL, rope("default", 1e6) | {"max_position_embeddings": 32768, "head_dim": 16}, {}),
    "Mistral v0.3": (
        {**MISTRAL, "rope_theta": 1000000.0, "sliding_window": None},
        rope("default", 1e6) | {"max_position_embeddings": 32768, "head_dim": 16},
        {},
    ),
}


def convert(name: str, folder: Path, output: Path, **options: Any) -> list[str]:
    if "Mistral" in name:
        return mistral.convert(MistralConfig(input=folder, output=output, **options))
    return llama.convert(LlamaConfig(input=folder, output=output, **options))


def both(name: str, language: Build, folder: Path) -> tuple[Any, Architecture, list[str]]:
    """The model, and what its Hugging Face folder converts to, in folder / "wanted"."""
    params, changes, options = MODELS[name]
    model = language(MistralForCausalLM if "Mistral" in name else LlamaForCausalLM, **changes)
    model.save_pretrained(folder / "hf")
    convert(name, folder / "hf", folder / "wanted")
    write(folder / "original", params, [original_state(model)])
    report = convert(name, folder / "original", folder / "language", **options)
    return model, load_architecture(folder / "wanted"), report


@pytest.mark.parametrize("name", MODELS)
def test_it_becomes_what_hugging_face_s_does(tmp_path: Path, language: Build, read_checkpoint: Read, name: str) -> None:
    model, wanted, report = both(name, language, tmp_path)
    found = load_architecture(tmp_path / "language")
    assert replace(found, sources=()) == replace(wanted, sources=())
    assert [source["file"] for source in found.sources] == ["consolidated.00.pth"]
    expected.assert_same(read_checkpoint(tmp_path / "language"), read_checkpoint(tmp_path / "wanted"))
    assert "  left out 1: computed from the rotary base" in report
    assert f"  {model.config.max_position_embeddings} positions, which params.json does not hold" in report


@pytest.mark.parametrize("name", ["LLaMA 2", "LLaMA 2 without groups", "LLaMA 3", "LLaMA 3.2", "Mistral v0.1"])
def test_it_computes_what_its_makers_compute(tmp_path: Path, language: Build, name: str) -> None:
    both(name, language, tmp_path)
    assert parity.check(tmp_path / "language", tmp_path / "original") < 2e-5


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize(("name", "embedding_axis"), [("LLaMA 2", 1), ("LLaMA 3", 0)])
def test_shards_are_joined(
    tmp_path: Path, language: Build, read_checkpoint: Read, name: str, shards: int, embedding_axis: int
) -> None:
    params, changes, _ = MODELS[name]
    model: Any = language(LlamaForCausalLM, **changes).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    convert(name, tmp_path / "hf", tmp_path / "wanted")
    write(tmp_path / "original", params, cut(original_state(model), shards, embedding_axis))
    convert(name, tmp_path / "original", tmp_path / "language")
    expected.assert_same(read_checkpoint(tmp_path / "language"), read_checkpoint(tmp_path / "wanted"))
    files = [source["file"] for source in load_architecture(tmp_path / "language").sources]
    assert files == [f"consolidated.{number:02}.pth" for number in range(shards)]


def test_safetensors(tmp_path: Path, language: Build, read_checkpoint: Read) -> None:
    params, changes, _ = MODELS["Mistral v0.3"]
    model: Any = language(MistralForCausalLM, **changes)
    model.save_pretrained(tmp_path / "hf")
    convert("Mistral", tmp_path / "hf", tmp_path / "wanted")
    state = {name: tensor.contiguous() for name, tensor in original_state(model).items() if name != "rope.freqs"}
    write(tmp_path / "original", params, [state], "safetensors")
    convert("Mistral", tmp_path / "original", tmp_path / "language")
    expected.assert_same(read_checkpoint(tmp_path / "language"), read_checkpoint(tmp_path / "wanted"))


def test_nothing_is_read_before_it_is_wanted(tmp_path: Path, language: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor more than one tensor at a time: its pieces, one of each shard."""
    model = language(LlamaForCausalLM, vocab_size=152)
    write(tmp_path / "original", LLAMA3, cut(original_state(model), 4, 0))
    read: list[str] = []

    def counted(path: Path) -> Any:
        weights = open_file(path)
        return replace(weights, read=lambda name: (read.append(f"{path.name} {name}"), weights.read(name))[1])

    open_file = consolidated.open_file
    monkeypatch.setattr(consolidated, "open_file", counted)
    weights = open_consolidated(tmp_path / "original")
    assert weights.headers["layers.0.attention.wo.weight"].shape == (64, 64) and read == []
    assert weights.read("layers.0.attention.wo.weight").shape == (64, 64)
    assert read == [f"consolidated.{number:02}.pth layers.0.attention.wo.weight" for number in range(4)]


def test_which_folders_are_consolidated(tmp_path: Path) -> None:
    assert not is_consolidated(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    assert not is_consolidated(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert is_consolidated(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # the hub's Mistral folders have both: Hugging Face's is taken
    assert not is_consolidated(tmp_path)


@pytest.fixture
def original(tmp_path: Path, language: Build) -> tuple[Path, list[State]]:
    """Four shards of a LLaMA 3."""
    folder = tmp_path / "original"
    shards = cut(original_state(language(LlamaForCausalLM, vocab_size=152)), 4, 0)
    write(folder, LLAMA3, shards)
    return folder, shards


def refused(folder: Path, **options: Any) -> str:
    output = folder.parent / "language"
    with pytest.raises(ValueError) as raised:
        convert("LLaMA", folder, output, **options)
    assert not output.exists()
    return str(raised.value)


def test_missing_shards(original: tuple[Path, list[State]]) -> None:
    folder, _ = original
    for number in (0, 2):
        (folder / f"consolidated.{number:02}.pth").unlink()
    assert "lacks consolidated.00.pth, consolidated.02.pth: download it again" in refused(folder)
    (folder / "consolidated.01.pth").rename(folder / "consolidated.00.pth")
    (folder / "consolidated.03.pth").unlink()
    message = refused(folder)  # the numbers tell nothing now, the shapes do
    assert "wrong shape: layers.0.attention.wq.weight is [16, 64], the architecture has [64, 64]" in message
    (folder / "consolidated.00.pth").rename(folder / "consolidated.first.pth")
    assert "holds neither of consolidated.safetensors and consolidated.00.pth" in refused(folder)


def test_two_forms_at_once(original: tuple[Path, list[State]]) -> None:
    folder, shards = original
    save_file(shards[0], folder / "consolidated.safetensors")
    assert "holds both of consolidated.safetensors and consolidated.00.pth" in refused(folder)


def test_shards_that_disagree(original: tuple[Path, list[State]]) -> None:
    folder, shards = original
    del shards[1]["layers.0.attention.wq.weight"]
    shards[2]["layers.1.attention.wo.weight"] = torch.ones(64, 8)
    shards[3]["norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    write(folder, LLAMA3, shards)
    message = refused(folder)
    assert "(3 differences)" in message
    first = folder / "consolidated.00.pth"
    for told in (
        f"only in one of {first} and {folder / 'consolidated.01.pth'}: layers.0.attention.wq.weight",
        f"layers.1.attention.wo.weight is [64, 16] torch.float32 in {first}, [64, 8] torch.float32 in ",
        f"norm.weight is [64] torch.float32 in {first}, [64] torch.bfloat16 in ",
    ):
        assert told in message


def test_copies_that_differ(original: tuple[Path, list[State]]) -> None:
    folder, shards = original
    shards[3]["layers.2.ffn_norm.weight"][7] += 1
    write(folder, LLAMA3, shards)
    assert "their copies of layers.2.ffn_norm.weight differ" in refused(folder)


def test_all_differing_tensors_are_named(tmp_path: Path, language: Build) -> None:
    state = original_state(language(LlamaForCausalLM, vocab_size=152))
    del state["output.weight"]
    state["layers.0.attention.wq.bias"] = torch.ones(64)
    state["layers.1.attention.wk.weight"] = torch.ones(32, 64, dtype=torch.int8)
    write(tmp_path / "original", LLAMA3, [state])
    message = refused(tmp_path / "original")
    for told in (
        "(3 differences)",
        "missing: output.weight [152, 64]",
        "unknown: layers.0.attention.wq.bias [64]",
        "wrong dtype: layers.1.attention.wk.weight is torch.int8",
    ):
        assert told in message


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (
            {**LLAMA3, "moe": {"num_experts": 8}, "lora_args": {"rank": 8}},
            {},
            "has lora_args, moe, which llama.py does",
        ),
        (MISTRAL, {}, "has hidden_dim, which llama.py does not know"),
        ({**LLAMA3, "dim": "64"}, {}, "'dim' must be a number above 0 (int), not '64'"),
        ({**LLAMA3, "norm_eps": None}, {}, "'norm_eps' must be a number above 0 (float), not None"),
        ({**LLAMA3, "vocab_size": 0}, {}, "'vocab_size' must be a number above 0"),
        ({**LLAMA3, "n_heads": 7}, {}, "dim 64 is not a multiple of n_heads 7"),
        (
            {**LLAMA3, "rope_theta": 1e6},
            {},
            "has rope_theta 1000000.0, which neither LLaMA 2 nor LLaMA 3 has: give --max",
        ),
        (LLAMA3, {"max_position_embeddings": 0}, "--max-position-embeddings must be at least 1, not 0"),
        (LLAMA31, {}, "does not say by how much: give --rotary-scaling-factor, which is 8 for LLaMA 3.1"),
        (LLAMA31, {"rotary_scaling_factor": 0.5}, "the factor of rotary scaling must be at least 1, not 0.5"),
        (
            {**LLAMA31, "rope_scaling_factor": 32},
            {"rotary_scaling_factor": 8.0},
            "has rope_scaling_factor 32, the option 8.0: leave the option out",
        ),
        (LLAMA3, {"rotary_scaling_factor": 8.0}, "has no use_scaled_rope: leave out --rotary-scaling-factor"),
    ],
)
def test_params_that_do_not_tell(
    original: tuple[Path, list[State]], params: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    folder, _ = original
    (folder / "params.json").write_text(json.dumps(params))
    assert message in refused(folder, **options)


def test_mistral_tells_more_than_meta(tmp_path: Path, language: Build) -> None:
    model = language(MistralForCausalLM, vocab_size=152, head_dim=16)
    for lacking in ("head_dim", "hidden_dim", "n_kv_heads", "vocab_size"):
        write(tmp_path, {key: MISTRAL[key] for key in MISTRAL if key != lacking}, [original_state(model)])
        with pytest.raises(ValueError, match=f"'{lacking}' must be a number above 0"):
            convert("Mistral", tmp_path, tmp_path / "language")


# params.json as published.
MISTRAL_7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
}
LLAMA2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
LLAMA3_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}


@pytest.mark.parametrize(
    ("params", "preset", "factor"),
    [
        (LLAMA2_7B, "llama2_7b", None),
        (LLAMA3_8B, "llama3_8b", None),
        ({**LLAMA3_8B, "use_scaled_rope": True}, "llama31_8b", 8.0),
        ({**MISTRAL_7B, "sliding_window": 4096}, "mistral_7b_v01", None),
        ({**MISTRAL_7B, "rope_theta": 1000000.0}, "mistral_7b_v02", None),
        ({**MISTRAL_7B, "rope_theta": 1000000.0, "vocab_size": 32768}, "mistral_7b_v03", None),
    ],
)
def test_published_params(params: dict[str, Any], preset: str, factor: float | None) -> None:
    wanted = LANGUAGE[preset]
    family = mistral.FAMILY if preset.startswith("mistral") else llama.FAMILY
    shapes = {
        "tok_embeddings.weight": (wanted.vocab_size, 4096),
        "output.weight": (wanted.vocab_size, 4096),
        "layers.0.feed_forward.w1.weight": (wanted.ffn_hidden_size, 4096),
    }
    weights = consolidated.Weights(
        name="original",
        files=(),
        headers={name: consolidated.Header(shape, torch.bfloat16) for name, shape in shapes.items()},
        read=lambda name: torch.full((1,), float(name == "output.weight")),
    )
    found = consolidated.read_architecture(params, Path("params.json"), weights, family, rotary_scaling_factor=factor)
    assert found == wanted


def test_the_newer_params_hold_the_scaling(original: tuple[Path, list[State]]) -> None:
    folder, _ = original
    params = {**LLAMA31, "rope_scaling_factor": 16, "rope_high_freq_factor": 2}
    (folder / "params.json").write_text(json.dumps(params))
    arch = llama.plan(LlamaConfig(input=folder, output=folder.parent / "language")).architecture.language
    assert arch is not None
    assert arch.rotary_scaling == RotaryScaling(rope_type="llama3", factor=16.0, high_freq_factor=2.0)


def test_the_tokenizer_may_be_elsewhere(original: tuple[Path, list[State]]) -> None:
    folder, _ = original
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert "is a tokenizer of tiktoken's" in refused(folder)
    other = folder.parent / "hugging face"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    convert("LLaMA", folder, folder.parent / "language", tokenizer=other)
    assert [path.name for path in (folder.parent / "language" / "tokenizer").iterdir()] == ["tokenizer.json"]
