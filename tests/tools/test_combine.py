"""combine.py, and what megatron-core makes of its checkpoints at several layouts."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import clip
import mistral
import pytest
import torch
from combine import CombineConfig, convert
from torch import Tensor

from mmcore.config import ParallelConfig
from mmcore.models.architecture import load_architecture
from tests import ranks

State = dict[str, Tensor]


@pytest.fixture
def towers(tmp_path: Path, clip_file: Path, mistral_folder: Path) -> CombineConfig:
    clip.convert(clip.ClipConfig(input=clip_file, output=tmp_path / "vision", head_width=16, activation="quick_gelu"))
    (mistral_folder / "tokenizer_config.json").write_text("{}")
    mistral.convert(mistral.MistralConfig(input=mistral_folder, output=tmp_path / "language"))
    return CombineConfig(vision=tmp_path / "vision", language=tmp_path / "language", output=tmp_path / "model")


def test_towers_are_joined(towers: CombineConfig, read_checkpoint: Callable[[Path], State]) -> None:
    convert(towers)
    found = read_checkpoint(towers.output)
    for key, tensor in (read_checkpoint(towers.vision) | read_checkpoint(towers.language)).items():
        assert torch.equal(found.pop(key), tensor), key
    # What torch's nn.Linear starts from: uniform within 1 / sqrt(inputs).
    encoder = "vision_projection.encoder."
    shapes = {"linear_fc1.weight": (48, 64), "linear_fc1.bias": (48,)}
    shapes |= {"linear_fc2.weight": (48, 48), "linear_fc2.bias": (48,)}
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == {
        encoder + name: shape for name, shape in shapes.items()
    }
    for layer, inputs in (("linear_fc1", 64), ("linear_fc2", 48)):
        for kind in ("weight", "bias"):
            largest = found[f"{encoder}{layer}.{kind}"].abs().max().item() * inputs**0.5
            assert 0.9 < largest <= 1
    model = load_architecture(towers.output)
    vision, language = load_architecture(towers.vision), load_architecture(towers.language)
    assert (model.vision, model.language) == (vision.vision, language.language)
    assert model.image_token_id == 150 and model.sources == vision.sources + language.sources
    assert [path.name for path in (towers.output / "tokenizer").iterdir()] == ["tokenizer_config.json"]


def test_the_seed_decides(towers: CombineConfig, read_checkpoint: Callable[[Path], State], tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(replace(towers, output=tmp_path / name, seed=seed))
        states.append(read_checkpoint(tmp_path / name))
    same, other = ([torch.equal(states[0][key], state[key]) for key in states[0]] for state in states[1:])
    assert all(same) and other.count(False) == 4


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"projector": "linear"}, {"weight": (48, 64), "bias": (48,)}),
        ({"projector": "megatron_mlp"}, {"linear_fc1.weight": (80, 64), "linear_fc2.weight": (48, 80)}),
        (
            {"projector_ffn_hidden_size": 24},
            {
                "linear_fc1.weight": (24, 64),
                "linear_fc1.bias": (24,),
                "linear_fc2.weight": (48, 24),
                "linear_fc2.bias": (48,),
            },
        ),
    ],
)
def test_projectors(
    towers: CombineConfig,
    read_checkpoint: Callable[[Path], State],
    options: dict[str, object],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    convert(replace(towers, **options))
    found = read_checkpoint(towers.output)
    prefix = "vision_projection.encoder."
    assert {key: tuple(value.shape) for key, value in found.items() if key.startswith("vision_projection")} == {
        prefix + name: shape for name, shape in shapes.items()
    }


def test_towers_in_the_wrong_places(towers: CombineConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--vision .*has no vision tower"):
        convert(replace(towers, vision=towers.language))
    with pytest.raises(ValueError, match=r"--language .*has no language model"):
        convert(replace(towers, language=towers.vision))
    with pytest.raises(ValueError, match=r"model.json does not exist"):
        convert(replace(towers, vision=tmp_path / "none"))
    with pytest.raises(ValueError, match="affine"):
        convert(replace(towers, projector="linear", projector_ffn_hidden_size=8))
    assert not towers.output.exists()


def loaded(folder: Path) -> dict[str, Tensor]:
    """This rank's parameters, by the names of the local spec's modules, after loading over NaN."""
    from megatron.core import parallel_state

    from mmcore.checkpoint import load_checkpoint
    from mmcore.models.llava import LlavaModel, base_config

    layout = ParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
    )
    model = LlavaModel(load_architecture(folder), "local", **base_config(layout))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    load_checkpoint(folder, model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "megatron_mlp"])
def test_megatron_core_loads_it(
    towers: CombineConfig, read_checkpoint: Callable[[Path], State], projector: str
) -> None:
    convert(replace(towers, projector=projector))
    stored = read_checkpoint(towers.output)
    (whole,) = ranks.run(loaded, ParallelConfig(), 1, towers.output)
    names = {"input": "self_attention.linear_qkv.layer_norm_", "pre_mlp": "mlp.linear_fc1.layer_norm_"}
    used = set()
    for name, parameter in whole.items():
        for local, canonical in names.items():
            name = name.replace(f"{local}_layernorm.", canonical)
        parts = name.split(".")
        number = next((int(part) for part in parts if part.isdigit()), None)
        key = ".".join(part for part in parts if not part.isdigit())
        assert torch.equal(parameter, stored[key] if number is None else stored[key][number]), name
        used.add(key)
    assert used == stored.keys()


def test_megatron_core_cuts_it(towers: CombineConfig) -> None:
    convert(towers)
    (whole,) = ranks.run(loaded, ParallelConfig(), 1, towers.output)
    halves = ranks.run(loaded, ParallelConfig(tensor_model_parallel_size=2), 2, towers.output)
    layer = "language_model.decoder.layers.1."
    for name in (f"{layer}self_attention.linear_qkv.weight", "language_model.output_layer.weight"):
        assert torch.equal(torch.cat([half[name] for half in halves]), whole[name])
    gate, up = whole[f"{layer}mlp.linear_fc1.weight"].chunk(2)
    for rank, half in enumerate(halves):
        wanted = torch.cat([part.chunk(2)[rank] for part in (gate, up)])
        assert torch.equal(half[f"{layer}mlp.linear_fc1.weight"], wanted)
    stages = ranks.run(loaded, ParallelConfig(pipeline_model_parallel_size=2), 2, towers.output)
    name = "self_attention.linear_qkv.weight"
    for stage, first in zip(stages, (0, 2), strict=True):
        for layer in range(2):
            wanted = whole[f"language_model.decoder.layers.{first + layer}.{name}"]
            assert torch.equal(stage[f"language_model.decoder.layers.{layer}.{name}"], wanted)


def projector_file(folder: Path, prefix: str, shapes: dict[str, tuple[int, ...]]) -> tuple[Path, State]:
    torch.manual_seed(3)
    state = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, folder / "mm_projector.bin")
    return folder / "mm_projector.bin", state


MLP = {"0.weight": (40, 64), "0.bias": (40,), "2.weight": (48, 40), "2.bias": (48,)}


@pytest.mark.parametrize("prefix", ["mm_projector.", "model.mm_projector.", "base_model.model.model.mm_projector."])
@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        (MLP, ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")),
        ({"0.weight": (48, 64), "2.weight": (48, 48)}, ("linear_fc1.weight", "linear_fc2.weight")),
        ({"weight": (48, 64), "bias": (48,)}, ("weight", "bias")),
        ({"weight": (48, 64)}, ("weight",)),
    ],
)
def test_a_trained_projector(
    towers: CombineConfig,
    read_checkpoint: Callable[[Path], State],
    prefix: str,
    shapes: dict[str, tuple[int, ...]],
    names: tuple[str, ...],
) -> None:
    path, state = projector_file(towers.output.parent, prefix, shapes)
    convert(replace(towers, projector_weights=path))
    found = read_checkpoint(towers.output)
    assert {key for key in found if key.startswith("vision_projection.")} == {
        f"vision_projection.encoder.{name}" for name in names
    }
    for name, tensor in zip(names, state.values(), strict=True):
        ours = found[f"vision_projection.encoder.{name}"]
        assert ours.dtype == torch.float16 and torch.equal(ours, tensor), name
    arch = load_architecture(towers.output)
    assert arch.vision_projection is not None and arch.sources[-1]["file"] == "mm_projector.bin"
    assert arch.vision_projection.add_bias_linear == any("bias" in name for name in names)
    assert arch.vision_projection.ffn_hidden_size == (shapes["0.weight"][0] if "0.weight" in shapes else 0)


def test_what_a_projectors_file_holds_beside_it(towers: CombineConfig) -> None:
    path, _ = projector_file(towers.output.parent, "model.mm_projector.", MLP)
    torch.save(torch.load(path, weights_only=True) | {"model.embed_tokens.weight": torch.ones(2, 48)}, path)
    report = convert(replace(towers, projector_weights=path))
    assert any("left out 1: not the projector's" in line for line in report)
    assert any("projector of mm_projector.bin: " in line for line in report)


@pytest.mark.parametrize(
    ("shapes", "options", "messages"),
    [
        (
            {**MLP, "0.weight": (40, 63), "2.bias": (47,)},
            {},
            [r"2 differences", r"wrong shape: 0.weight is \[40, 63\], .* \[40, 64\]", r"wrong shape: 2.bias is \[47\]"],
        ),
        ({"0.weight": (40, 64), "0.bias": (40,), "2.weight": (48, 40)}, {}, [r"missing: 2.bias \[48\]"]),
        ({**MLP, "4.weight": (48, 48), "4.bias": (48,)}, {}, ["known are one linear layer and mlp2x_gelu"]),
        (MLP, {"projector_ffn_hidden_size": 40}, ["has its own width and bias"]),
        (MLP, {"projector_bias": "true"}, ["has its own width and bias"]),
    ],
)
def test_projectors_that_do_not_fit(
    towers: CombineConfig, shapes: dict[str, tuple[int, ...]], options: dict[str, object], messages: list[str]
) -> None:
    path, _ = projector_file(towers.output.parent, "mm_projector.", shapes)
    with pytest.raises(ValueError) as raised:
        convert(replace(towers, projector_weights=path, **options))
    for message in messages:
        assert re.search(message, str(raised.value))
    assert not towers.output.exists()


def test_a_file_without_a_projector(towers: CombineConfig, clip_file: Path) -> None:
    with pytest.raises(ValueError, match="its mm_projector has no tensors"):
        convert(replace(towers, projector_weights=clip_file))


@pytest.mark.parametrize(
    ("options", "is_biased"),
    [
        ({"projector": "mlp2x_gelu", "projector_bias": "false"}, False),
        ({"projector": "megatron_mlp", "projector_bias": "true"}, True),
        ({"projector": "linear", "projector_bias": "false"}, False),
    ],
)
def test_the_bias_by_option(
    towers: CombineConfig, read_checkpoint: Callable[[Path], State], options: dict[str, object], is_biased: bool
) -> None:
    convert(replace(towers, **options))
    names = [key for key in read_checkpoint(towers.output) if key.startswith("vision_projection.")]
    assert any(name.endswith("bias") for name in names) == is_biased
