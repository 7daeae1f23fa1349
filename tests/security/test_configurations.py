"""Configurations of strangers: YAML, the JSON beside weights, tokenizers, folders of the hub with code of their own."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hugging_face_tokenizer
import mistral
import pytest
import tokenizers
import weight_files
from parity.originals import open_original
from transformers import MistralConfig, MistralForCausalLM

from mmcore.config_yaml import load_yaml, merge
from mmcore.data.tokenizer import load_tokenizer
from mmcore.models.presets import compose
from mmcore.recipes import RECIPES
from tests import tiny
from tests.data import fabricated
from tests.security import payloads
from tests.security.sandbox import opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
YAML = {
    "a call": ("!!python/object/apply:os.system ['touch ../marker']", "is not YAML"),
    "a call as a value": ("model:\n  checkpoint: !!python/object/apply:os.mkdir [../marker]\n", "is not YAML"),
    "a name": ("model: !!python/name:os.system\n", "is not YAML"),
    "a module": ("model: !!python/module:antigravity\n", "is not YAML"),
    "an object": ("model: !!python/object/new:os.system ['touch ../marker']", "is not YAML"),
    "aliases of aliases": (f"{LAUGHS}model: *a11\n", "is not YAML: it stands for more than"),
    "a long text, again and again": (f"a: &a {'x' * 9000}\nmodel: [{', '.join(['*a'] * 900)}]\n", "it stands for more"),
    "what holds itself": ("model: &a [*a]\n", "it stands for more"),
    "many brackets": ("model: " + "[" * 2000, "is not YAML"),
    "a key that is unknown": ("__class__: os.system\n", "unknown key '__class__'"),
    "no text": ("\x00\x01", "is not YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_a_hostile_configuration_of_a_run(folder: Path, name: str) -> None:
    text, told = YAML[name]
    (folder / "run.yaml").write_text(text)
    recipe = next(iter(RECIPES.values()))()
    outcome = opened(folder, lambda: merge(recipe, load_yaml(folder / "run.yaml"), "run.yaml"))
    assert outcome.startswith("ValueError: ") and told in outcome, outcome


def test_honest_aliases_are_read(folder: Path) -> None:
    (folder / "run.yaml").write_text("model: &m {checkpoint: a}\nmore: {<<: *m, other: 1}\n")
    assert load_yaml(folder / "run.yaml")["more"] == {"checkpoint": "a", "other": 1}


def vocabulary(**changes: Any) -> dict[str, Any]:
    model = tokenizers.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(["<s>", "</s>"])
    return {**json.loads(made.to_str()), **changes}


PADDING = {
    "strategy": {"Fixed": 1 << 31},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "a",
}
CUT = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
TOKENIZERS: dict[str, tuple[str, str]] = {
    "padding to billions": (json.dumps(vocabulary(padding=PADDING)), "done: [0]"),
    "a text cut to a token": (json.dumps(vocabulary(truncation=CUT)), "done: [0]"),
    "many brackets": ("[" * 100_000, "ValueError: "),
    "a list": ("[]", "ValueError: "),
    "an unknown kind of model": (json.dumps(vocabulary(model={"type": "os.system"})), "ValueError: "),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer(folder: Path, name: str) -> None:
    """Used as training uses it, and as an export does."""
    content, told = TOKENIZERS[name]
    (folder / "tokenizer.json").write_text(content)
    assert opened(folder, lambda: load_tokenizer(folder).encode("a")).startswith(told)
    outcome = opened(folder, lambda: hugging_face_tokenizer.read_tokenizer(folder, 8).encode("a"))
    assert outcome.startswith(told), outcome


def test_hostile_files_beside_a_tokenizer(folder: Path) -> None:
    fabricated.write_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    assert opened(folder, lambda: load_tokenizer(folder)).startswith("ValueError: ")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.model").write_bytes(payloads.gadgets(folder.parent / "marker")["posix.system"])
    assert opened(folder, lambda: load_tokenizer(folder)).startswith("ValueError: ")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: Any) -> Path:
    """A folder of the hub whose configurations name code of its own."""
    folder: Path = tmp_path_factory.mktemp("hub")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=150, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    MistralForCausalLM(config).save_pretrained(folder)
    fabricated.write_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary()))
    code = {
        "AutoConfig": "planted.Config",
        "AutoModelForCausalLM": "planted.Model",
        "AutoTokenizer": ["planted.T", None],
    }
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, "auto_map": code, "custom_pipelines": {"x": {"impl": "planted.P"}}}))
    return folder


def copied(hub: Path, folder: Path) -> Path:
    program = f"open({str(folder.parent / 'marker')!r}, 'w')"
    for path in hub.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("planted.py", "modeling_mistral.py", "configuration_mistral.py"):
        (folder / name).write_text(program)
    return folder


def planned(folder: Path) -> Callable[[], Any]:
    return lambda: len(mistral.plan(mistral.MistralConfig(input=folder, output=folder / "out")).tensors)


def test_code_of_a_folder_is_not_run(hub: Path, folder: Path) -> None:
    """Neither by the converter, nor by the original library in a proof, nor does an export take it along."""
    copied(hub, folder)
    assert opened(folder, planned(folder)).startswith("done: ")
    architecture = compose(tiny.VISION, tiny.LANGUAGE, tiny.architecture().vision_projection)
    assert "MistralForCausalLM" in opened(folder, lambda: open_original([folder], architecture).name)
    found = hugging_face_tokenizer.read_tokenizer(folder, 8)
    assert found is not None and b"planted.T" not in b"".join(found.files.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**9},
        {"vocab_size": 10**12},
        {"num_hidden_layers": -1},
        {"num_attention_heads": "__import__('os')"},
        {"rope_parameters": {"rope_type": "os.system", "factor": 1e308}},
    ],
    ids=str,
)
def test_a_configuration_of_absurd_sizes(hub: Path, folder: Path, changes: dict[str, Any]) -> None:
    path = copied(hub, folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert not opened(folder, planned(folder)).startswith("done: ")


def test_hostile_weights_in_a_folder(hub: Path, folder: Path) -> None:
    copied(hub, folder)
    good = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    for content in (
        struct.pack("<Q", 1 << 62) + good[8:],
        struct.pack("<Q", length) + b"[" * length + good[8 + length :],
        good.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
    ):
        (folder / "model.safetensors").write_bytes(content)
        assert "cannot be read as safetensors" in opened(folder, lambda: weight_files.open_folder(folder))
    (folder / "model.safetensors").unlink()
    pickled = payloads.gadgets(folder.parent / "marker")["posix.system"]
    (folder / "pytorch_model.bin").write_bytes(payloads.torch_archive(pickled))
    assert "is refused: it holds more than tensors" in opened(folder, planned(folder))
    architecture = tiny.architecture()
    assert not opened(folder, lambda: open_original([folder], architecture)).startswith("done: ")
    (folder / "config.json").write_text("[" * 100_000)
    assert opened(folder, planned(folder)).startswith("ValueError: ")
