"""--format megatron, against loops over the originals' tensors and against mcore's own modules.

Loops over heads, groups and rows say what every rank's file must hold; then megatron-core's modules of
every rank take the files, and are equal to the bit to those that load the torch_dist checkpoint.
"""

import weakref
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import clip
import combine
import llama
import mistral
import pytest
import qwen2
import siglip
import torch
from checkpoint_folder import StoredTensor
from conversion import OutputConfig
from megatron.core import parallel_state
from megatron_format import write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig
from transformers import SiglipVisionModel as Siglip

from mmcore import checkpoint
from mmcore.config import ParallelConfig
from mmcore.models.architecture import Architecture, LanguageArch, load_architecture
from mmcore.models.llava import LlavaModel, base_config
from tests import ranks

State = dict[str, Tensor]
Files = dict[str, dict[str, Any]]

HEADS, GROUPS, CHANNELS, FFN, LAYERS, VOCAB = 8, 4, 16, 80, 4, 150
SHAPE = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


def megatron(tensor_size: int, stages: int = 1) -> dict[str, Any]:
    return {
        "format": "megatron",
        "tensor_model_parallel_size": tensor_size,
        "pipeline_model_parallel_size": stages,
    }


def read(folder: Path) -> Files:
    """The ranks' files by the names of their folders."""
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    with torch.serialization.safe_globals([Namespace]):
        return {
            path.name: torch.load(path / "model_optim_rng.pt", weights_only=True)
            for path in (folder / "iter_0000001").iterdir()
        }


def assert_same(found: dict[str, Tensor | None], wanted: State) -> None:
    """All tensors and no others; None beside the weights of the linear layers that ranks share."""
    layers = {name.rpartition(".")[0] for name in wanted if name.endswith(".weight")}
    extra = {
        f"{layer}._extra_state" for layer in layers if layer.endswith(LINEAR) or layer.endswith("projection.encoder")
    }
    assert {name for name, tensor in found.items() if tensor is None} == extra
    assert found.keys() - extra == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name]
        assert other is not None and other.dtype == tensor.dtype and torch.equal(other, tensor), name
        assert other.is_contiguous() and other.untyped_storage().nbytes() == other.nbytes, name


def part(tensor: Tensor, rank: int, size: int, dim: int = 0) -> Tensor:
    length = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * length, length)


def expected_vision(state: State, rank: int, size: int) -> State:
    """One rank's tensors of open_clip's tower of four heads of 16 channels, three layers and an MLP of 96."""
    wanted = {
        "class_token": state["visual.class_embedding"][None, None],
        "position_embeddings.weight": state["visual.positional_embedding"],
        "conv1.weight": state["visual.conv1.weight"],
        "ln_pre.weight": state["visual.ln_pre.weight"],
        "ln_pre.bias": state["visual.ln_pre.bias"],
    }
    for layer in range(3):
        old, new = f"visual.transformer.resblocks.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            stacked = state[f"{old}attn.in_proj_{kind}"]
            heads = [
                stacked[which * 64 + head * 16 : which * 64 + head * 16 + 16]
                for head in range(rank * 4 // size, (rank + 1) * 4 // size)
                for which in range(3)
            ]
            wanted[f"{new}self_attention.linear_qkv.{kind}"] = torch.cat(heads)
            wanted[f"{new}self_attention.linear_qkv.layer_norm_{kind}"] = state[f"{old}ln_1.{kind}"]
            wanted[f"{new}mlp.linear_fc1.layer_norm_{kind}"] = state[f"{old}ln_2.{kind}"]
            wanted[f"{new}mlp.linear_fc1.{kind}"] = part(state[f"{old}mlp.c_fc.{kind}"], rank, size)
        for name, source in (("self_attention.linear_proj", "attn.out_proj"), ("mlp.linear_fc2", "mlp.c_proj")):
            wanted[f"{new}{name}.weight"] = part(state[f"{old}{source}.weight"], rank, size, dim=1)
            wanted[f"{new}{name}.bias"] = state[f"{old}{source}.bias"]
    return wanted


def vocabulary(table: Tensor, rank: int, size: int) -> Tensor:
    padded = 128 * size * -(-VOCAB // (128 * size))
    first, last = rank * padded // size, (rank + 1) * padded // size
    return torch.stack([table[min(row, VOCAB - 1)] for row in range(first, last)])


def expected_language(state: State, rank: int, size: int, stage: int, stages: int) -> State:
    """One rank's tensors of a Hugging Face decoder of the shape above."""
    wanted = {}
    if stage == 0:
        wanted["embedding.word_embeddings.weight"] = vocabulary(state["model.embed_tokens.weight"], rank, size)
    if stage == stages - 1:
        wanted["decoder.final_layernorm.weight"] = state["model.norm.weight"]
        wanted["output_layer.weight"] = vocabulary(state["lm_head.weight"], rank, size)
    for number in range(LAYERS // stages):
        old, new = f"model.layers.{stage * LAYERS // stages + number}.", f"decoder.layers.{number}."
        for kind in ("weight", "bias"):
            if f"{old}self_attn.q_proj.{kind}" not in state:
                continue
            query, key, value = (state[f"{old}self_attn.{name}_proj.{kind}"] for name in "qkv")
            rows = []
            for group in range(rank * GROUPS // size, (rank + 1) * GROUPS // size):
                for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
                    rows.append(query[head * CHANNELS : (head + 1) * CHANNELS])
                rows.append(key[group * CHANNELS : (group + 1) * CHANNELS])
                rows.append(value[group * CHANNELS : (group + 1) * CHANNELS])
            wanted[f"{new}self_attention.linear_qkv.{kind}"] = torch.cat(rows)
        gate, up = (part(state[f"{old}mlp.{name}_proj.weight"], rank, size) for name in ("gate", "up"))
        wanted |= {
            f"{new}self_attention.linear_qkv.layer_norm_weight": state[f"{old}input_layernorm.weight"],
            f"{new}self_attention.linear_proj.weight": part(state[f"{old}self_attn.o_proj.weight"], rank, size, dim=1),
            f"{new}mlp.linear_fc1.layer_norm_weight": state[f"{old}post_attention_layernorm.weight"],
            f"{new}mlp.linear_fc1.weight": torch.cat([gate, up]),
            f"{new}mlp.linear_fc2.weight": part(state[f"{old}mlp.down_proj.weight"], rank, size, dim=1),
        }
    return wanted


def convert_vision(source: Path, output: Path, **options: Any) -> list[str]:
    return clip.convert(clip.ClipConfig(input=source, output=output, head_width=16, activation="quick_gelu", **options))


def names(size: int, stages: int) -> dict[str, tuple[int, int]]:
    """Folders of the ranks: tensor rank and stage."""
    if stages == 1:
        return {f"mp_rank_0{rank}": (rank, 0) for rank in range(size)}
    return {f"mp_rank_0{rank}_00{stage}": (rank, stage) for rank in range(size) for stage in range(stages)}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vision_tower(tmp_path: Path, clip_state: State, size: int) -> None:
    # As OpenAI's, matrices in fp16: Megatron-LM's converter makes them fp32.
    state = {name: tensor if "ln_" in name else tensor.half() for name, tensor in clip_state.items()}
    torch.save(state, tmp_path / "clip.pt")
    report = convert_vision(tmp_path / "clip.pt", tmp_path / "out", **megatron(size))
    files = read(tmp_path / "out")
    assert files.keys() == names(size, 1).keys()
    whole = {name: tensor.float() for name, tensor in state.items()}
    for name, (rank, _) in names(size, 1).items():
        assert files[name].keys() == {"model"}
        assert_same(files[name]["model"], expected_vision(whole, rank, size))
    assert "  left out 2: Megatron-LM's CLIP has no norm after its last layer" in report
    assert any("from layer -1, where mmcore does from layer -2" in line for line in report)
    assert load_architecture(tmp_path / "out").vision is not None


def test_siglip_keeps_its_last_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Siglip(SiglipVisionConfig(image_size=16, patch_size=8, vision_use_head=False, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "hf")
    config = siglip.SiglipConfig(input=tmp_path / "hf", output=tmp_path / "out", feature_layer=-1, **megatron(2))
    report = siglip.convert(config)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    for file in read(tmp_path / "out").values():
        for kind in ("weight", "bias"):
            assert torch.equal(file["model"][f"ln_post.{kind}"], state[f"post_layernorm.{kind}"])
        assert torch.equal(file["model"]["conv1.bias"], state["embeddings.patch_embedding.bias"])
        assert "class_token" not in file["model"]
    assert not any("Megatron-LM" in line for line in report)


@pytest.mark.parametrize(("size", "stages"), LAYOUTS)
def test_language_model(tmp_path: Path, mistral: Callable[..., Any], size: int, stages: int) -> None:
    model = mistral(**SHAPE).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    convert_language(tmp_path / "hf", tmp_path / "out", **megatron(size, stages))
    files = read(tmp_path / "out")
    assert files.keys() == names(size, stages).keys()
    for name, (rank, stage) in names(size, stages).items():
        assert_same(files[name].pop("model"), expected_language(model.state_dict(), rank, size, stage, stages))
        arguments = vars(files[name].pop("args"))
        assert files[name] == {"checkpoint_version": 3.0, "iteration": 1, "num_floating_point_operations_so_far": 0}
        known = {
            "num_layers": 4,
            "hidden_size": 48,
            "ffn_hidden_size": 80,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "group_query_attention": True,
            "kv_channels": 16,
            "max_position_embeddings": 128,
            "rotary_base": 1_000_000,
            "use_rope_scaling": False,
            "window_size": None,
            "layernorm_epsilon": 1e-6,
            "untie_embeddings_and_output_weights": True,
            "add_qkv_bias": False,
            "padded_vocab_size": 512 if size == 4 else 256,
            "vocab_size": 150,
            "tensor_model_parallel_size": size,
            "pipeline_model_parallel_size": stages,
            "params_dtype": torch.bfloat16,
            "bf16": True,
            "tokenizer_type": "HuggingFaceTokenizer",
        }
        assert {key: arguments[key] for key in known} == known


def convert_language(source: Path, output: Path, **options: Any) -> list[str]:
    return mistral.convert(mistral.MistralConfig(input=source, output=output, **options))


def test_what_else_megatron_must_be_told(tmp_path: Path, mistral: Callable[..., Any]) -> None:
    mistral(sliding_window=64, rms_norm_eps=1e-5).save_pretrained(tmp_path / "mistral")
    report = convert_language(tmp_path / "mistral", tmp_path / "a", **megatron(1))
    assert any("so give it --window-size 63,0" in line for line in report)
    assert read(tmp_path / "a")["mp_rank_00"]["args"].window_size == (63, 0)
    assert any("padded by 106 copies of its last row" in line for line in report)

    scalings = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        "linear": {},
        "dynamic": {},
    }
    reports, arguments = {}, {}
    for name, rest in scalings.items():
        rope = {"rope_type": name, "rope_theta": 5e5, "factor": 4.0, **rest}
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=100, rms_norm_eps=1e-6, rope_parameters=rope, **sizes)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        options = llama.LlamaConfig(input=tmp_path / name, output=tmp_path / f"{name}-out", **megatron(1))
        reports[name] = llama.convert(options)[-1]
        arguments[name] = read(tmp_path / f"{name}-out")["mp_rank_00"]["args"]
    assert reports["llama3"].endswith("--norm-epsilon 1e-06 --use-rope-scaling --rope-scaling-factor 4")
    assert reports["linear"].endswith("--norm-epsilon 1e-06 --rotary-seq-len-interpolation-factor 4")
    assert reports["dynamic"].endswith("no dynamic rotary scaling: it is right up to 2048 tokens")
    scaled = ("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor")
    assert {name: [getattr(found, key) for key in scaled] for name, found in arguments.items()} == {
        "llama3": [True, 4.0, None],
        "linear": [False, 8.0, 4.0],
        "dynamic": [False, 8.0, None],
    }
    assert all(found.rotary_base == 500_000 and not found.group_query_attention for found in arguments.values())


@pytest.mark.parametrize("stages", [1, 2])
def test_tied_embeddings(tmp_path: Path, stages: int) -> None:
    """The last of several stages has a copy, which Megatron-LM keeps in step; biases are cut by group as well."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **sizes, **SHAPE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "hf")
    config = qwen2.Qwen2Config(input=tmp_path / "hf", output=tmp_path / "out", **megatron(2, stages))
    qwen2.convert(config)
    files = read(tmp_path / "out")
    for name, (rank, stage) in names(2, stages).items():
        wanted = expected_language(model.state_dict(), rank, 2, stage, stages)
        if stages == 1:
            del wanted["output_layer.weight"]
        assert_same(files[name]["model"], wanted)
        arguments = files[name]["args"]
        assert arguments.add_qkv_bias and not arguments.untie_embeddings_and_output_weights


@pytest.fixture
def towers(tmp_path: Path, clip_file: Path, mistral: Callable[..., Any]) -> combine.CombineConfig:
    """Checkpoints to combine; a vocabulary that needs no padding, so that every layout has the same rows."""
    mistral(**SHAPE, vocab_size=512).save_pretrained(tmp_path / "hf")
    convert_vision(clip_file, tmp_path / "vision")
    convert_language(tmp_path / "hf", tmp_path / "language")
    return combine.CombineConfig(vision=tmp_path / "vision", language=tmp_path / "language", output=tmp_path / "model")


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "megatron_mlp"])
def test_whole_model(
    towers: combine.CombineConfig, read_checkpoint: Callable[[Path], State], clip_state: State, projector: str
) -> None:
    """The towers' files under prefixes, the arguments of the language model's, and the projector."""
    tmp_path, size, stages = towers.output.parent, 2, 2
    convert_language(tmp_path / "hf", tmp_path / "language-cut", **megatron(size, stages))
    combine.convert(replace(towers, projector=projector))
    combine.convert(replace(towers, projector=projector, output=tmp_path / "cut", **megatron(size, stages)))
    stored, alone, files = read_checkpoint(towers.output), read(tmp_path / "language-cut"), read(tmp_path / "cut")
    assert files.keys() == names(size, stages).keys()
    for name, (rank, stage) in names(size, stages).items():
        language = {key: tensor for key, tensor in alone[name].pop("model").items() if tensor is not None}
        wanted = {f"language_model.{key}": tensor for key, tensor in language.items()}
        if stage == 0:
            wanted |= {f"vision_model.{key}": value for key, value in expected_vision(clip_state, rank, size).items()}
            for key, tensor in stored.items():
                if key.startswith("vision_projection.") and not key.endswith("linear_fc2.bias"):
                    tensor = part(tensor, rank, size, dim=1 if "linear_fc2" in key else 0)
                if key.startswith("vision_projection."):
                    wanted[key] = tensor
        assert_same(files[name].pop("model"), wanted)
        arguments = {**vars(alone[name].pop("args")), "tokenizer_type": "MultimodalTokenizer"}
        assert vars(files[name].pop("args")) == arguments and files[name] == alone[name]


def differences(whole: Path, cut: Path) -> tuple[list[str], list[str], list[str]]:
    """This rank's modules, loaded from both: names missing in its file, unknown to mcore, and not equal."""
    layout = ParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
    )
    model = LlavaModel(load_architecture(whole), "local", **base_config(layout))
    checkpoint.load_checkpoint(whole, model)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if layout.pipeline_model_parallel_size > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    # Norms are modules of their own here, and parts of the layers after them in Transformer Engine.
    local = {"self_attention.linear_qkv.layer_norm_": "input_layernorm."}
    local["mlp.linear_fc1.layer_norm_"] = "pre_mlp_layernorm."
    state = {}
    for key, tensor in read(cut)[name]["model"].items():
        for fused, separate in local.items():
            key = key.replace(fused, separate)
        state[key] = tensor
    missing, unknown = model.load_state_dict(state, strict=False)
    unequal = [key for key, tensor in model.named_parameters() if not torch.equal(tensor, wanted[key])]
    return missing, unknown, unequal


@pytest.mark.parametrize(("size", "stages"), LAYOUTS)
def test_megatron_core_takes_every_file(towers: combine.CombineConfig, size: int, stages: int) -> None:
    cut = towers.output.with_name("cut")
    combine.convert(towers)
    combine.convert(replace(towers, output=cut, **megatron(size, stages)))
    layout = ParallelConfig(tensor_model_parallel_size=size, pipeline_model_parallel_size=stages)
    results = ranks.run(differences, layout, size * stages, towers.output, cut)
    # Megatron-LM's CLIP has no norm after its last layer; mmcore's keeps it, and never runs it.
    left_out = ["vision_model.ln_post.weight", "vision_model.ln_post.bias"]
    for rank, (missing, unknown, unequal) in enumerate(results):
        expected = left_out if rank < size else []
        assert (missing, unknown, unequal) == (expected, [], expected)


def test_other_readers_take_the_archives(tmp_path: Path, mistral_folder: Path) -> None:
    convert_language(mistral_folder, tmp_path / "out", **megatron(2))
    for name, content in read(tmp_path / "out").items():
        path = tmp_path / "out" / "iter_0000001" / name / "model_optim_rng.pt"
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            records = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        tensors = [tensor for tensor in content["model"].values() if tensor is not None]
        assert [entry.file_size for entry in records] == [tensor.nbytes for tensor in tensors]
        # Readers of streams, which have not come to the archive's directory, find the checksum after the record.
        stored = path.read_bytes()
        assert all(b"PK\x07\x08" + entry.CRC.to_bytes(4, "little") in stored for entry in records)
        with torch.serialization.safe_globals([Namespace]):
            mapped = torch.load(path, mmap=True, weights_only=True)["model"]
        for key, tensor in content["model"].items():
            assert tensor is None or torch.equal(mapped[key], tensor)


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Every tensor is read once, whatever the layout, and gone from memory before the next one is."""
    language = LanguageArch(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=2,
        vocab_size=100,
        max_position_embeddings=16,
        share_embeddings_and_output_weights=True,
    )
    shapes = {
        "embedding.word_embeddings.weight": (128, 8),
        "decoder.layers.self_attention.linear_qkv.weight": (24, 8),
        "decoder.layers.mlp.linear_fc1.weight": (32, 8),
        "decoder.layers.mlp.linear_fc2.weight": (8, 16),
        "decoder.final_layernorm.weight": (8,),
    }
    done: list[tuple[str, int]] = []
    last: list[weakref.ref[Tensor]] = []

    def reads(key: str, layer: int) -> Tensor:
        assert not last or last.pop()() is None, f"{done[-1]} is still in memory"
        tensor = torch.randn(shapes[key])
        done.append((key, layer))
        last.append(weakref.ref(tensor))
        return tensor

    tensors = {
        f"language_model.{key}": StoredTensor(
            shape=shape,
            dtype=torch.float32,
            chunks=tuple(
                (lambda key=key, layer=layer: reads(key, layer)) for layer in range(2 if ".layers." in key else 1)
            ),
            is_stacked=".layers." in key,
        )
        for key, shape in shapes.items()
    }
    told: list[int] = []
    write(
        tmp_path,
        Architecture(language=language),
        tensors,
        OutputConfig(output=tmp_path, **megatron(2, 2)),
        told.append,
    )
    assert len(done) == len(set(done)) == 8
    assert sum(told) == sum(tensor.num_bytes for tensor in tensors.values())
    assert [layer for _, layer in done] == [0] * 5 + [1] * 3
    assert len(read(tmp_path)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            megatron(8),
            r"--tensor-model-parallel-size 8 does not divide the attention heads of the vision tower \(4\), "
            r"the key-value heads of the language model \(4\): choose",
        ),
        (megatron(1, 3), "--pipeline-model-parallel-size 3 does not divide the 4 layers of the language model"),
        (megatron(5, 3), r"vision tower \(96\), .*; --pipeline-model-parallel-size 3 does not divide"),
    ],
)
def test_layouts_that_do_not_fit(towers: combine.CombineConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine.convert(replace(towers, **options))
    assert not towers.output.exists()


def test_projectors_that_do_not_fit(towers: combine.CombineConfig, clip_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not divide the width of the projector \(42\)"):
        combine.convert(replace(towers, projector_ffn_hidden_size=42, **megatron(4)))
    with pytest.raises(ValueError, match=r"2 is for models with a language model"):
        convert_vision(clip_file, tmp_path / "out", **megatron(1, 2))


def test_the_plan_says_what_is_left_out(clip_file: Path, tmp_path: Path) -> None:
    lines = convert_vision(clip_file, tmp_path / "out", dry_run=True, **megatron(2))
    assert "left out 2: Megatron-LM's CLIP has no norm after its last layer" in lines
    assert not any(line.startswith("vision_model.ln_post") for line in lines)
    assert not (tmp_path / "out").exists()
