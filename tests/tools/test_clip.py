"""clip.py, against open_clip's and transformers' own classes and an independent reading of their state dicts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clip import ClipConfig, convert
from safetensors.torch import save_file
from torch import Tensor

from mmcore.models.architecture import VisionArch, load_architecture
from tests.tools import parity
from tests.tools.expected import assert_same

State = dict[str, Tensor]
WIDTH, HEADS, LAYERS = 64, 4, 3


def config(source: Path, **options: object) -> ClipConfig:
    return ClipConfig(
        **{"input": source, "output": source.parent / "vision", "head_width": 16, "activation": "quick_gelu", **options}
    )


def expected(state: State) -> State:
    """Every tensor by the names of megatron-core, from the text of its documentation and a loop over heads."""
    layers: dict[str, list[Tensor]] = {}
    for layer in range(LAYERS):
        block = f"visual.transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            q, k, v = state[f"{block}attn.in_proj_{kind}"].split(WIDTH)
            heads = [part[16 * head : 16 * head + 16] for head in range(HEADS) for part in (q, k, v)]
            for name, tensor in {
                f"self_attention.linear_qkv.{kind}": torch.cat(heads),
                f"self_attention.linear_qkv.layer_norm_{kind}": state[f"{block}ln_1.{kind}"],
                f"self_attention.linear_proj.{kind}": state[f"{block}attn.out_proj.{kind}"],
                f"mlp.linear_fc1.layer_norm_{kind}": state[f"{block}ln_2.{kind}"],
                f"mlp.linear_fc1.{kind}": state[f"{block}mlp.c_fc.{kind}"],
                f"mlp.linear_fc2.{kind}": state[f"{block}mlp.c_proj.{kind}"],
            }.items():
                layers.setdefault(f"vision_model.decoder.layers.{name}", []).append(tensor)
    return {key: torch.stack(parts) for key, parts in layers.items()} | {
        "vision_model.class_token": state["visual.class_embedding"][None, None],
        "vision_model.position_embeddings.weight": state["visual.positional_embedding"],
        "vision_model.conv1.weight": state["visual.conv1.weight"],
        "vision_model.ln_pre.weight": state["visual.ln_pre.weight"],
        "vision_model.ln_pre.bias": state["visual.ln_pre.bias"],
        "vision_model.ln_post.weight": state["visual.ln_post.weight"],
        "vision_model.ln_post.bias": state["visual.ln_post.bias"],
    }


def test_every_tensor(clip_file: Path, clip_state: State, read_checkpoint: Callable[[Path], State]) -> None:
    report = convert(config(clip_file))
    assert_same(read_checkpoint(clip_file.parent / "vision"), expected(clip_state))
    found = load_architecture(clip_file.parent / "vision")
    assert found.vision == VisionArch(
        num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, image_size=32, patch_dim=8
    )
    assert found.language is None and found.sources[0]["file"] == "clip.pt" and len(found.sources[0]["sha256"]) == 64
    assert any("left out 29: text tower" in line for line in report)
    assert any("left out 2: contrastive head" in line for line in report)


def test_half_precision_is_kept(tmp_path: Path, clip_state: State, read_checkpoint: Callable[[Path], State]) -> None:
    """As OpenAI's: matrices in fp16, norms in fp32, sizes beside them."""
    state = {name: tensor if "ln_" in name else tensor.half() for name, tensor in clip_state.items()}
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(8), "vocab_size": torch.tensor(40)}
    torch.save(state | sizes, tmp_path / "clip.pt")
    convert(config(tmp_path / "clip.pt"))
    assert_same(read_checkpoint(tmp_path / "vision"), expected(state))


def test_fixed_positions_without_text_tower(
    tmp_path: Path, clip: Callable[..., torch.nn.Module], read_checkpoint: Callable[[Path], State]
) -> None:
    state = {f"visual.{name}": tensor for name, tensor in clip(pos_embed_type="sin_cos_2d").visual.state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors")
    options = {"activation": "gelu", "feature_layer": -1, "head_width": 0, "num_attention_heads": 4}
    convert(config(tmp_path / "clip.safetensors", **options))
    assert_same(read_checkpoint(tmp_path / "vision"), expected(state))
    vision = load_architecture(tmp_path / "vision").vision
    assert vision is not None and (vision.activation, vision.feature_layer) == ("gelu", -1)


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (1280, 16)])
def test_heads_by_convention(tmp_path: Path, clip: Callable[..., torch.nn.Module], width: int, heads: int) -> None:
    torch.save(clip(width=width, layers=2, mlp_ratio=0.5).state_dict(), tmp_path / "clip.pt")
    convert(config(tmp_path / "clip.pt", head_width=0))
    vision = load_architecture(tmp_path / "vision").vision
    assert vision is not None and vision.num_attention_heads == heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_width": 48}, "48 channels do not divide the tower's width 64"),
        ({"num_attention_heads": 5, "head_width": 0}, "--num-attention-heads 5 does not divide the tower's width 64"),
        ({"num_attention_heads": 8}, "--num-attention-heads 8 x --head-width 16 is not the tower's width 64"),
        ({"num_attention_heads": -4}, "must not be negative"),
        ({"feature_layer": -4}, "feature_layer -4 must lie between -3 and -1"),
        ({"feature_layer": 0}, "feature_layer 0 must lie between -3 and -1"),
    ],
)
def test_options_that_contradict_the_shapes(clip_file: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(config(clip_file, **options))
    assert not (clip_file.parent / "vision").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.attn_pool.query": torch.ones(2)}, r"unknown: visual.attn_pool.query \[2\]"),
        ({"visual.transformer.resblocks.1.ls_1.gamma": torch.ones(64)}, "unknown: .*ls_1.gamma"),
        ({"visual.ln_pre.bias": None}, "missing: visual.ln_pre.bias"),
        ({"visual.transformer.resblocks.1.ln_1.bias": torch.ones(65)}, r"wrong shape: .*\[65\], .* \[64\]"),
        ({"visual.positional_embedding": torch.ones(16, 64)}, "has 16 rows"),
        ({"visual.positional_embedding": torch.ones(26, 65)}, r"wrong shape: visual.positional_embedding"),
        ({"visual.conv1.weight": None}, r"visual.conv1.weight should be \[width, 3, patch, patch\], found no such"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, clip_state: State, changes: State, message: str) -> None:
    state = {name: tensor for name, tensor in (clip_state | changes).items() if tensor is not None}
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=message):
        convert(config(tmp_path / "clip.pt"))
    assert not (tmp_path / "vision").exists()


def test_a_folder_is_no_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the file of weights"):
        convert(replace(config(tmp_path / "x"), input=tmp_path))


# ---- OpenAI's archive


def test_openai_archive(
    tmp_path: Path, clip: Callable[..., torch.nn.Module], read_checkpoint: Callable[[Path], State]
) -> None:
    """Matrices in half precision and the sizes among the weights, in a TorchScript archive: it tells its activation."""
    model = clip()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, size in (("input_resolution", 32), ("context_length", 8), ("vocab_size", 40)):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(size))
    inputs = torch.zeros(1, 3, 32, 32), torch.zeros(1, 8, dtype=torch.long)
    torch.jit.trace(model, inputs, check_trace=False).save(tmp_path / "clip.pt")
    convert(config(tmp_path / "clip.pt", activation=""))
    assert_same(read_checkpoint(tmp_path / "vision"), expected(state))
    vision = load_architecture(tmp_path / "vision").vision
    assert vision is not None and vision.activation == "quick_gelu"


def test_a_state_dict_does_not_tell_its_activation(clip_file: Path) -> None:
    with pytest.raises(ValueError, match="--activation quick_gelu for OpenAI's weights"):
        convert(config(clip_file, activation=""))


# ---- open_clip's folder

WEIGHTS = "open_clip_model.safetensors"


def open_clip_folder(
    folder: Path, state: State, weights: str = "open_clip_model.safetensors", **vision: object
) -> Path:
    folder.mkdir()
    save = save_file if weights.endswith("safetensors") else torch.save
    save(state, folder / weights)
    sizes = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "mlp_ratio": 1.5}
    vision = {**sizes, **vision}
    content = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def from_folder(folder: Path, **options: object) -> ClipConfig:
    return ClipConfig(input=folder, output=folder.parent / "vision", **options)


@pytest.mark.parametrize("weights", [WEIGHTS, "open_clip_pytorch_model.bin"])
def test_open_clip_folder(
    tmp_path: Path, clip_state: State, read_checkpoint: Callable[[Path], State], weights: str
) -> None:
    folder = open_clip_folder(tmp_path / "open", clip_state, weights, norm_kwargs={"eps": 1e-6})
    (folder / "config.json").write_text('{"architecture": "vit_tiny"}')  # timm's, which says nothing here
    convert(from_folder(folder))
    assert_same(read_checkpoint(tmp_path / "vision"), expected(clip_state))
    vision = load_architecture(tmp_path / "vision").vision
    assert vision == VisionArch(
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        image_size=32,
        patch_dim=8,
        activation="gelu",
        layernorm_epsilon=1e-6,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
    )


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"act_kwargs": {"approximate": "tanh"}, "no_ln_pre": True, "norm_kwargs": {"eps": 1e-6, "bias": False}},
            {},
            r"another network .*no_ln_pre True, act_kwargs .*, norm_kwargs",
        ),
        ({"timm_model_name": "vit_so400m"}, {}, "timm_model_name 'vit_so400m'.*siglip.py"),
        ({"layers": [3, 4, 6, 3]}, {}, "of a ResNet"),
        ({"layers": 4, "image_size": [40, 40]}, {}, r"layers is 4, the weights have 3; image_size is \[40, 40\]"),
        ({}, {"head_width": 32, "activation": "quick_gelu"}, "--head-width 32 but it says 16, --activation quick_gelu"),
        ({"head_width": "wide"}, {}, "'head_width' must be a number"),
    ],
)
def test_open_clip_folders_that_do_not_fit(
    tmp_path: Path, clip_state: State, changes: dict[str, object], options: dict[str, object], message: str
) -> None:
    folder = open_clip_folder(tmp_path / "open", clip_state, **changes)
    with pytest.raises(ValueError, match=message):
        convert(from_folder(folder, **options))


def test_open_clip_folders_that_lack_a_file(tmp_path: Path, clip_state: State) -> None:
    folder = open_clip_folder(tmp_path / "open", clip_state)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"but none of {WEIGHTS}"):
        convert(from_folder(folder))
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no model_cfg.vision_cfg"):
        convert(from_folder(folder))


# ---- against the libraries themselves


def test_parity_of_openais_state_dict(tmp_path: Path, clip: Callable[..., torch.nn.Module]) -> None:
    model = clip(layers=4, head_width=8)
    for parameter in model.parameters():  # so that no softmax is all or nothing
        parameter.data *= 0.2
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    convert(config(tmp_path / "clip.pt", head_width=8))
    parity.check(tmp_path / "vision", tmp_path / "clip.pt")


def test_parity_of_an_open_clip_folder(tmp_path: Path, clip: Callable[..., torch.nn.Module]) -> None:
    state = {name: 0.2 * tensor for name, tensor in clip(layers=4).state_dict().items()}
    folder = open_clip_folder(tmp_path / "open", state, layers=4, head_width=8)
    (folder / "config.json").write_text('{"architecture": "vit_tiny"}')  # timm's
    convert(from_folder(folder))
    parity.check(tmp_path / "vision", folder)
