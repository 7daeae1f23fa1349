"""LLaMA and Mistral as their makers keep them: params.json beside consolidated weights.

The tensors are Hugging Face's by other names, but for the order of the channels of queries and keys.
"""

import re
from pathlib import Path
from typing import Any

import torch
from conversion import Conversion
from decoder import DecoderConfig, Family, Names, are_equal, conversion, number
from decoder import weight_map as decoder_map
from layout import group_interleaved_qkv
from torch import Tensor
from weight_files import Header, Weights, open_file, read_json
from weight_map import Drop, Move

from mmcore.models.architecture import LanguageArch, RotaryScaling

# meta-llama/llama-models models/llama3/model.py; mistralai/mistral-inference transformer.py.
NAMES = Names(
    word_embeddings="tok_embeddings",
    attention_norm="layers.{}.attention_norm",
    qkv=("layers.{}.attention.wq", "layers.{}.attention.wk", "layers.{}.attention.wv"),
    attention_output="layers.{}.attention.wo",
    mlp_norm="layers.{}.ffn_norm",
    gate="layers.{}.feed_forward.w1",
    up="layers.{}.feed_forward.w3",
    down="layers.{}.feed_forward.w2",
    final_norm="norm",
    head="output",
    dropped=(Drop("rope.freqs", "computed from the rotary base"),),
)

# Along which axis Meta's model parallel ranks cut a tensor; they repeat the others.
AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "output": 0}

# Keys of params.json that tell of a model's architecture, or of nothing that its weights do not.
KEYS = {
    "llama": {
        *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "norm_eps"),
        *("rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor"),
        *("multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len"),
    },
    "mistral": {
        *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps"),
        *("rope_theta", "sliding_window", "max_batch_size"),
    },
}


def is_consolidated(folder: Path) -> bool:
    """Whether a folder is in this layout, and not in Hugging Face's as well."""
    has_params = (folder / "params.json").is_file() and not (folder / "config.json").is_file()
    return has_params and any(folder.glob("consolidated*"))


def open_consolidated(folder: Path) -> Weights:
    """The weights, whole: what model parallel ranks cut is joined when it is read.

    Raises:
        ValueError: a shard is missing or cannot be read, or the shards disagree. Reading raises it too,
            for copies that differ.
    """
    shards = [open_file(path) for path in _files(folder)]
    if problems := [problem for shard in shards[1:] for problem in _differences(shards[0], shard)]:
        raise ValueError(
            f"the shards of {folder} are not of one model ({len(problems)} differences); download them again:\n  "
            + "\n  ".join(sorted(problems))
        )
    headers = shards[0].headers
    axes = {name: _axis(name, headers) for name in headers}
    return Weights(
        name=str(folder),
        files=tuple(shard.files[0] for shard in shards),
        headers={name: _whole(header, axes[name], len(shards)) for name, header in headers.items()},
        read=lambda name: _join(name, [shard.read(name) for shard in shards], axes[name], folder),
    )


def _files(folder: Path) -> list[Path]:
    """The shards, by number."""
    whole = folder / "consolidated.safetensors"
    found = ((re.fullmatch(r"consolidated\.(\d+)\.pth", path.name), path) for path in folder.glob("consolidated.*"))
    numbered = {int(match[1]): path for match, path in found if match}
    if whole.is_file() == bool(numbered):
        raise ValueError(
            f"{folder} holds {'both' if numbered else 'neither'} of consolidated.safetensors and consolidated.00.pth: "
            "it must be one of them"
        )
    if missing := set(range(max(numbered, default=0))) - numbered.keys():
        names = ", ".join(f"consolidated.{number:02}.pth" for number in sorted(missing))
        raise ValueError(f"{folder} lacks {names}: download it again")
    return [numbered[number] for number in sorted(numbered)] or [whole]


def _differences(first: Weights, shard: Weights) -> list[str]:
    found = [f"only in one of {first.name} and {shard.name}: {name}" for name in first.headers.keys() ^ shard.headers]
    for name in first.headers.keys() & shard.headers:
        one, other = first.headers[name], shard.headers[name]
        if one != other:
            found.append(
                f"{name} is {list(one.shape)} {one.dtype} in {first.name}, "
                f"{list(other.shape)} {other.dtype} in {shard.name}"
            )
    return found


def _axis(name: str, headers: dict[str, Header]) -> int | None:
    if name == "tok_embeddings.weight":  # LLaMA 2 cuts its columns, LLaMA 3 its rows
        norm = headers.get("norm.weight")
        return 0 if norm is not None and headers[name].shape[1:] == norm.shape else 1
    return AXES.get(name.removesuffix(".weight").rpartition(".")[2])


def _whole(header: Header, axis: int | None, shards: int) -> Header:
    if axis is None:
        return header
    sizes = enumerate(header.shape)
    return Header(tuple(size * shards if index == axis else size for index, size in sizes), header.dtype)


def _join(name: str, parts: list[Tensor], axis: int | None, folder: Path) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if axis is not None:
        return torch.cat(parts, axis)
    if not all(torch.equal(parts[0], part) for part in parts[1:]):
        raise ValueError(f"the shards of {folder} are not of one model: their copies of {name} differ")
    return parts[0]


def weight_map(arch: LanguageArch) -> tuple[Move | Drop, ...]:
    """From the makers' names."""
    return decoder_map(arch, NAMES, group_interleaved_qkv(arch.num_attention_heads, arch.num_query_groups))


def read_architecture(
    params: dict[str, Any],
    path: Path,
    weights: Weights,
    family: Family,
    max_position_embeddings: int | None = None,
    rotary_scaling_factor: float | None = None,
) -> LanguageArch:
    """The architecture that params.json, the weights' shapes and the options describe.

    Args:
        path: where `params` was read, for messages.
        max_position_embeddings: instead of what the model is known to have.
        rotary_scaling_factor: where `params` asks for scaling and does not say how much.
    Raises:
        ValueError: another model, a value is missing, or it cannot be told.
    """
    if unknown := {name for name, value in params.items() if value is not None} - KEYS[family.model_type]:
        raise ValueError(
            f"{path} has {', '.join(sorted(unknown))}, which {family.model_type}.py does not know: the model is "
            "another, or one that is not supported"
        )
    is_mistral = family.model_type == "mistral"
    hidden, heads = number(params, path, "dim"), number(params, path, "n_heads")
    positions = _positions(params, path, family) if max_position_embeddings is None else max_position_embeddings
    if params.get("head_dim") is None and hidden % heads:
        raise ValueError(f"{path}: dim {hidden} is not a multiple of n_heads {heads}")
    has_groups, has_head_dim = (is_mistral or params.get(name) is not None for name in ("n_kv_heads", "head_dim"))
    has_vocab_size = is_mistral or params.get("vocab_size", -1) != -1  # LLaMA 2's is -1
    return LanguageArch(
        model_type=family.model_type,
        num_layers=number(params, path, "n_layers"),
        hidden_size=hidden,
        ffn_hidden_size=number(params, path, "hidden_dim") if is_mistral else _rows(weights, NAMES.gate.format(0)),
        num_attention_heads=heads,
        num_query_groups=number(params, path, "n_kv_heads") if has_groups else heads,
        kv_channels=number(params, path, "head_dim") if has_head_dim else hidden // heads,
        vocab_size=number(params, path, "vocab_size") if has_vocab_size else _rows(weights, NAMES.word_embeddings),
        max_position_embeddings=positions,
        rotary_base=_rotary_base(params, path, family),
        rotary_scaling=_rotary_scaling(params, path, rotary_scaling_factor),
        sliding_window=None if params.get("sliding_window") is None else number(params, path, "sliding_window"),
        layernorm_epsilon=number(params, path, "norm_eps", float),
        share_embeddings_and_output_weights=not is_mistral and _is_tied(weights),
    )


def _rows(weights: Weights, name: str) -> int:
    header = weights.headers.get(f"{name}.weight")
    if header is None or not header.shape:
        raise ValueError(f"{weights.name} has no {name}.weight: it may be of another model, or incomplete")
    return header.shape[0]


def _is_tied(weights: Weights) -> bool:
    """LLaMA 3.2's small models keep their one table twice."""
    both = (f"{NAMES.word_embeddings}.weight", f"{NAMES.head}.weight")
    return weights.headers.keys() >= set(both) and are_equal(weights, *both)


def _rotary_base(params: dict[str, Any], path: Path, family: Family) -> float:
    if params.get("rope_theta") is not None:
        return float(number(params, path, "rope_theta", float))
    # What the makers' code took before the key was there: mistral-inference 1.1, meta-llama/llama at 6c7fe27.
    has_large_base = family.model_type == "mistral" and params.get("sliding_window") is None
    return 1_000_000.0 if has_large_base else 10_000.0


def _rotary_scaling(params: dict[str, Any], path: Path, factor: float | None) -> RotaryScaling | None:
    """LLaMA 3.1's. Source: meta-llama/llama-models models/llama3/model.py, apply_scaling."""
    if not params.get("use_scaled_rope"):
        if factor is not None:
            raise ValueError(f"{path} has no use_scaled_rope: leave out --rotary-scaling-factor")
        return None
    known = params.get("rope_scaling_factor")
    if known is None and factor is None:
        raise ValueError(
            f"{path} asks for scaled rotary embeddings and does not say by how much: give --rotary-scaling-factor, "
            "which is 8 for LLaMA 3.1 and 3.3 and 32 for LLaMA 3.2's 1B and 3B"
        )
    if known is not None and factor not in (None, known):
        raise ValueError(f"{path} has rope_scaling_factor {known}, the option {factor}: leave the option out")
    values = {"rope_high_freq_factor": 4.0, **params, "rope_scaling_factor": factor if known is None else known}
    return RotaryScaling(
        rope_type="llama3",
        factor=number(values, path, "rope_scaling_factor", float),
        high_freq_factor=number(values, path, "rope_high_freq_factor", float),
    )


def _positions(params: dict[str, Any], path: Path, family: Family) -> int:
    """max_position_embeddings of the config.json that the same model has on Hugging Face."""
    if family.model_type == "mistral":
        return 32768  # Mistral 7B, all versions
    if params.get("use_scaled_rope"):
        return 131072  # LLaMA 3.1 and later
    base = params.get("rope_theta")
    if base not in (None, 500_000):
        raise ValueError(
            f"{path} has rope_theta {base}, which neither LLaMA 2 nor LLaMA 3 has: give --max-position-embeddings"
        )
    return 4096 if base is None else 8192  # LLaMA 2, LLaMA 3


def plan(
    config: DecoderConfig,
    family: Family,
    max_position_embeddings: int | None = None,
    rotary_scaling_factor: float | None = None,
) -> Conversion:
    """Plan the conversion.

    Args:
        max_position_embeddings, rotary_scaling_factor: as `read_architecture`.
    Raises:
        ValueError: the input does not fit.
    """
    path = config.input / "params.json"
    weights = open_consolidated(config.input)
    arch = read_architecture(read_json(path), path, weights, family, max_position_embeddings, rotary_scaling_factor)
    note = f"{arch.max_position_embeddings} positions, which {path.name} does not hold"
    return conversion(config, family, arch, weights, weight_map(arch), note)
