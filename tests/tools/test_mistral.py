"""mistral.py, against transformers' own model."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoder
import mistral as mistral_py
import pytest
import torch
from mistral import MistralConfig, convert
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from tokenizer_files import tokenizer_size
from torch import Tensor
from transformers import MistralForCausalLM

from mmcore.models.architecture import LanguageArch, load_architecture
from mmcore.models.presets import LANGUAGE
from tests.tools import parity

State = dict[str, Tensor]
ARCH = LanguageArch(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=150,
    max_position_embeddings=128,
    rotary_base=1e6,
    layernorm_epsilon=1e-6,
)


# config.json as published.
MISTRAL_7B_V01: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_7B_V02 = {**MISTRAL_7B_V01, "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None}


@pytest.mark.parametrize(
    ("content", "preset"),
    [
        (MISTRAL_7B_V01, "mistral_7b_v01"),
        (MISTRAL_7B_V02, "mistral_7b_v02"),
        ({**MISTRAL_7B_V02, "vocab_size": 32768}, "mistral_7b_v03"),
        ({**MISTRAL_7B_V02, "vocab_size": 32768, "head_dim": None}, "mistral_7b_v03"),
    ],
)
def test_published_configurations(content: dict[str, Any], preset: str) -> None:
    assert decoder.read_architecture(content, Path("config.json"), mistral_py.FAMILY) == LANGUAGE[preset]


@pytest.mark.parametrize("changes", [{}, {"head_dim": 16}, {"sliding_window": 12}])
def test_it_computes_what_transformers_computes(
    tmp_path: Path, language: Callable[..., torch.nn.Module], changes: dict[str, Any]
) -> None:
    """The window is shorter than the texts of the comparison."""
    language(MistralForCausalLM, **changes).save_pretrained(tmp_path / "hf")
    convert(config(tmp_path / "hf"))
    assert parity.check(tmp_path / "language", tmp_path / "hf") < 2e-5


def config(folder: Path) -> MistralConfig:
    return MistralConfig(input=folder, output=folder.parent / "language")


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def expected(state: State) -> State:
    """Every tensor by the names of megatron-core, from a loop over groups."""
    layers: dict[str, list[Tensor]] = {}
    for layer in range(4):
        block = f"model.layers.{layer}."
        q, k, v = (state[f"{block}self_attn.{part}_proj.weight"].split(16) for part in "qkv")
        rows = [head for group in range(2) for head in (q[2 * group], q[2 * group + 1], k[group], v[group])]
        for name, tensor in {
            "self_attention.linear_qkv.weight": torch.cat(rows),
            "self_attention.linear_qkv.layer_norm_weight": state[f"{block}input_layernorm.weight"],
            "self_attention.linear_proj.weight": state[f"{block}self_attn.o_proj.weight"],
            "mlp.linear_fc1.layer_norm_weight": state[f"{block}post_attention_layernorm.weight"],
            "mlp.linear_fc1.weight": torch.cat([state[f"{block}mlp.{part}_proj.weight"] for part in ("gate", "up")]),
            "mlp.linear_fc2.weight": state[f"{block}mlp.down_proj.weight"],
        }.items():
            layers.setdefault(f"language_model.decoder.layers.{name}", []).append(tensor)
    padding = torch.zeros(256 - 150, 48, dtype=state["lm_head.weight"].dtype)
    return {key: torch.stack(parts) for key, parts in layers.items()} | {
        "language_model.embedding.word_embeddings.weight": torch.cat([state["model.embed_tokens.weight"], padding]),
        "language_model.decoder.final_layernorm.weight": state["model.norm.weight"],
        "language_model.output_layer.weight": torch.cat([state["lm_head.weight"], padding]),
    }


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize("form", ["whole", "shards", "bin"])
def test_every_tensor(
    tmp_path: Path, mistral: Callable[..., torch.nn.Module], read_checkpoint: Callable[[Path], State], form: str
) -> None:
    model, folder = mistral().to(torch.bfloat16), tmp_path / "hf"
    model.save_pretrained(folder, max_shard_size="20KB" if form == "shards" else "1GB")
    if form == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert (folder / "model.safetensors.index.json").exists() == (form == "shards")
    convert(config(folder))
    assert_same(read_checkpoint(tmp_path / "language"), expected(model.state_dict()))
    found = load_architecture(tmp_path / "language")
    assert found.language == ARCH and found.vision is None
    assert len(found.sources) == (len(list(folder.glob("*.safetensors"))) if form != "bin" else 1)


def test_tied_embeddings(
    tmp_path: Path, mistral: Callable[..., torch.nn.Module], read_checkpoint: Callable[[Path], State]
) -> None:
    mistral(tie_word_embeddings=True).save_pretrained(tmp_path / "hf")
    convert(config(tmp_path / "hf"))
    assert "language_model.output_layer.weight" not in read_checkpoint(tmp_path / "language")
    language = load_architecture(tmp_path / "language").language
    assert language is not None and language.share_embeddings_and_output_weights


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": "gone", "rope_theta": 1000000.0},
        {"rope_parameters": "gone", "rope_scaling": None, "rope_theta": 1000000},
    ],
)
def test_rotary_base_of_older_configurations(mistral_folder: Path, changes: dict[str, object]) -> None:
    edit(mistral_folder / "config.json", **changes)
    convert(config(mistral_folder))
    language = load_architecture(mistral_folder.parent / "language").language
    assert language is not None and language.rotary_base == 1e6


@pytest.mark.parametrize(("changes", "window"), [({"sliding_window": 16}, 16), ({"sliding_window": "gone"}, 4096)])
def test_sliding_window(mistral_folder: Path, changes: dict[str, object], window: int) -> None:
    edit(mistral_folder / "config.json", **changes)
    convert(config(mistral_folder))
    language = load_architecture(mistral_folder.parent / "language").language
    assert language is not None and language.sliding_window == window


def test_channels_of_a_head_follow_from_the_width(tmp_path: Path, mistral: Callable[..., torch.nn.Module]) -> None:
    mistral(head_dim=12).save_pretrained(tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", head_dim="gone")
    convert(config(tmp_path / "hf"))
    language = load_architecture(tmp_path / "language").language
    assert language is not None and language.kv_channels == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": "gone"}, "no base is assumed"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type is 'yarn'"),
        ({"sliding_window": 0}, "'sliding_window' must be a number above 0"),
        ({"sliding_window": [128, None]}, "'sliding_window' must be a number above 0"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": "gone"}, "'num_key_value_heads' must be a number above 0"),
        ({"num_key_value_heads": 3}, "num_query_groups 3"),
        ({"hidden_size": "48"}, "'hidden_size' must be a number"),
        ({"num_hidden_layers": 3}, "unknown: model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 5}, "missing: model.layers.4.input_layernorm.weight"),
        ({"vocab_size": 151}, r"wrong shape: lm_head.weight is \[150, 48\], the architecture has \[151, 48\]"),
    ],
)
def test_configurations_that_do_not_fit(mistral_folder: Path, changes: dict[str, object], message: str) -> None:
    edit(mistral_folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert(config(mistral_folder))
    assert not (mistral_folder.parent / "language").exists()


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        convert(config(tmp_path / "none"))


def test_all_differing_tensors_are_named(mistral_folder: Path) -> None:
    path = mistral_folder / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    del state["model.norm.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match="2 differences") as raised:
        convert(config(mistral_folder))
    assert "unknown: model.layers.0.self_attn.q_proj.bias [64]" in str(raised.value)
    assert "missing: model.norm.weight [48]" in str(raised.value)


def sentencepiece(path: Path, size: int) -> None:
    model = io.BytesIO()
    words = (f"{chr(97 + i % 26)}{chr(97 + i // 26)}{i}" for i in range(400))
    SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=size, model_type="bpe", minloglevel=3
    )
    path.write_bytes(model.getvalue())


def test_tokenizer_files_go_along(mistral_folder: Path) -> None:
    sentencepiece(mistral_folder / "tokenizer.model.v3", 150)
    added = [{"id": 149, "content": "<pad>"}]
    (mistral_folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    (mistral_folder / "tokenizer_config.json").write_text("{}")
    convert(config(mistral_folder))
    found = {path.name for path in (mistral_folder.parent / "language" / "tokenizer").iterdir()}
    assert found == {"tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json"}


def test_a_tokenizer_of_another_model(mistral_folder: Path) -> None:
    sentencepiece(mistral_folder / "tokenizer.model", 151)
    with pytest.raises(ValueError, match=r"tokenizer.model has 151 pieces but the model's vocab_size is 150"):
        convert(config(mistral_folder))
    (mistral_folder / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read as a sentencepiece model"):
        convert(config(mistral_folder))
    (mistral_folder / "tokenizer.model").unlink()
    (mistral_folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", 0.0]] * 200}}))
    assert tokenizer_size(mistral_folder / "tokenizer.json") == 200
    with pytest.raises(ValueError, match="has 200 pieces"):
        convert(config(mistral_folder))
    (mistral_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        convert(config(mistral_folder))
