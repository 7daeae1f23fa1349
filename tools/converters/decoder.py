"""LLaMA-shaped decoders as Hugging Face keeps them: one weight map for LLaMA, Mistral, Qwen2 and their kin."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from conversion import Conversion, ConverterConfig
from layout import Layout, group_qkv, keep, pad_rows, stack_rows
from tokenizer_files import TOKENIZER_FILES, find_tokenizer
from weight_files import Weights, open_folder, read_json
from weight_map import Drop, Move, apply

from mmcore.constants import LANGUAGE_MODEL
from mmcore.models.architecture import Architecture, LanguageArch, RotaryScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ConverterConfig):
    """What the converters of language models have in common."""

    tokenizer: Path | None = None
    """Folder with the tokenizer; by default the input."""
    conversation: str = ""
    """Conversation template that the model was tuned with; by default that of its family."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What is read, and so must not be replaced."""
        return (self.input,) if self.tokenizer is None else (self.input, self.tokenizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What sets one family's config.json apart."""

    model_type: Literal["llama", "mistral", "qwen2"]
    conversation: str
    """Template of mmcore.data.templates that its tuned models take."""
    add_qkv_bias: bool = False
    default_rotary_base: float | None = None
    """What a config.json without rope_theta means; None refuses it."""
    default_sliding_window: int | None = None
    """What a config.json without sliding_window means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a library calls the weights of such a decoder; "{}" is the number of the layer."""

    word_embeddings: str
    attention_norm: str
    qkv: tuple[str, ...]
    """Query, key and value; or the one tensor that holds them in mcore's order."""
    attention_output: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    final_norm: str
    head: str
    dropped: tuple[Drop, ...]


# transformers models/llama/modeling_llama.py; mistral's and qwen2's modules have the same names.
HUGGING_FACE = Names(
    word_embeddings="model.embed_tokens",
    attention_norm="model.layers.{}.input_layernorm",
    qkv=("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj", "model.layers.{}.self_attn.v_proj"),
    attention_output="model.layers.{}.self_attn.o_proj",
    mlp_norm="model.layers.{}.post_attention_layernorm",
    gate="model.layers.{}.mlp.gate_proj",
    up="model.layers.{}.mlp.up_proj",
    down="model.layers.{}.mlp.down_proj",
    final_norm="model.norm",
    head="lm_head",
    dropped=(Drop("model.layers.*.self_attn.rotary_emb.inv_freq", "computed from the rotary base"),),
)


def weight_map(arch: LanguageArch, names: Names = HUGGING_FACE, qkv: Layout | None = None) -> tuple[Move | Drop, ...]:
    """The map from a library's names.

    Args:
        qkv: how its query, key and value become mcore's one tensor; `group_qkv` if None.
    """
    h, f, v = arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size
    query, kv = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    qkv = qkv or group_qkv(arch.num_attention_heads, arch.num_query_groups)
    pad, layers = pad_rows(v, arch.padded_vocab_size), f"{LANGUAGE_MODEL}.decoder.layers."
    projections = dict(zip(names.qkv, (query, kv, kv) if len(names.qkv) > 1 else (query + 2 * kv,), strict=True))

    def move(target: str, shape: tuple[int, ...], *sources: str, layout: Layout = keep) -> Move:
        return Move(f"{target}weight", {f"{name}.weight": shape for name in sources}, layout)

    head: Move | Drop = move(f"{LANGUAGE_MODEL}.output_layer.", (v, h), names.head, layout=pad)
    if arch.share_embeddings_and_output_weights:
        head = Drop(f"{names.head}.weight", "tied: the embedding takes its place")
    biases = {f"{name}.bias": (rows,) for name, rows in projections.items()}
    return (
        move(f"{LANGUAGE_MODEL}.embedding.word_embeddings.", (v, h), names.word_embeddings, layout=pad),
        move(f"{layers}self_attention.linear_qkv.layer_norm_", (h,), names.attention_norm),
        Move(
            f"{layers}self_attention.linear_qkv.weight",
            {f"{name}.weight": (rows, h) for name, rows in projections.items()},
            qkv,
        ),
        *((Move(f"{layers}self_attention.linear_qkv.bias", biases, qkv),) if arch.add_qkv_bias else ()),
        move(f"{layers}self_attention.linear_proj.", (h, query), names.attention_output),
        move(f"{layers}mlp.linear_fc1.layer_norm_", (h,), names.mlp_norm),
        move(f"{layers}mlp.linear_fc1.", (f, h), names.gate, names.up, layout=stack_rows),
        move(f"{layers}mlp.linear_fc2.", (h, f), names.down),
        move(f"{LANGUAGE_MODEL}.decoder.final_layernorm.", (h,), names.final_norm),
        head,
        *names.dropped,
    )


def number(config: dict[str, Any], path: Path, name: str, kind: type = int) -> Any:
    """A number above 0 of a configuration.

    Args:
        kind: int, or float, which may be written as an int.
    Raises:
        ValueError: it is missing, or something else.
    """
    found: Any = config.get(name)
    if isinstance(found, bool) or not isinstance(found, (kind, int)) or not 0 < found < math.inf:
        raise ValueError(f"{path}: {name!r} must be a number above 0 ({kind.__name__}), not {found!r}")
    return kind(found)


def read_architecture(config: dict[str, Any], path: Path, family: Family) -> LanguageArch:
    """The architecture that a config.json, or a part of one, describes.

    Args:
        path: where it was read, for messages.
    Raises:
        ValueError: not of this family, a value is missing, or it asks for what is not supported.
    """
    if config.get("model_type") != family.model_type:
        raise ValueError(
            f"{path}: model_type is {config.get('model_type')!r}; this converter takes {family.model_type!r}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act is {config['hidden_act']!r}; only 'silu' is supported")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise ValueError(f"{path}: {name} is true; biases on the layers' outputs are not supported")
    hidden, heads = number(config, path, "hidden_size"), number(config, path, "num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    base, scaling = rotary(config, path, family.default_rotary_base)
    grouped = config.get("num_key_value_heads") is not None or family.model_type != "llama"
    return LanguageArch(
        model_type=family.model_type,
        num_layers=number(config, path, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=number(config, path, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=number(config, path, "num_key_value_heads") if grouped else heads,
        kv_channels=hidden // heads if config.get("head_dim") is None else number(config, path, "head_dim"),
        vocab_size=number(config, path, "vocab_size"),
        max_position_embeddings=number(config, path, "max_position_embeddings"),
        rotary_base=base,
        rotary_scaling=scaling,
        sliding_window=_sliding_window(config, path, family),
        add_qkv_bias=family.add_qkv_bias,
        layernorm_epsilon=number(config, path, "rms_norm_eps", float),
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
    )


def _sliding_window(config: dict[str, Any], path: Path, family: Family) -> int | None:
    kinds = set(config.get("layer_types") or ())
    if config.get("use_sliding_window") or kinds - {"full_attention"}:  # Qwen2's is for the upper layers
        raise ValueError(f"{path} asks for a sliding window in some layers only, which is not supported")
    window = config.get("sliding_window", family.default_sliding_window)
    if family.model_type != "mistral" or window is None:
        return None
    return int(number({"sliding_window": window}, path, "sliding_window"))


def rotary(config: dict[str, Any], path: Path, default_base: float | None) -> tuple[float, RotaryScaling | None]:
    """Base and scaling of the rotary embeddings.

    transformers 5 writes rope_parameters; before it, rope_theta stood alone and rope_scaling beside it.

    Raises:
        ValueError: no base, or a scaling that is not supported.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: rope_parameters or rope_scaling must hold names and values, not {parameters!r}")
    base: Any = parameters.get("rope_theta", config.get("rope_theta", default_base))
    if isinstance(base, bool) or not isinstance(base, int | float) or base <= 0:
        raise ValueError(
            f"{path}: neither rope_parameters.rope_theta nor rope_theta is a number above 0 (found {base!r}); no base "
            "is assumed, for a wrong one converts without an error and answers nonsense"
        )
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"{path}: partial_rotary_factor asks to rotate some channels only, which is not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(base), None
    if kind not in ("linear", "dynamic", "llama3"):
        raise ValueError(f"{path}: rope_type is {kind!r}; the scalings that are known are linear, dynamic and llama3")
    rest: dict[str, Any] = {}
    if kind == "llama3":
        rest = {name: number(parameters, path, name, float) for name in ("low_freq_factor", "high_freq_factor")}
        rest["original_max_position_embeddings"] = number(parameters, path, "original_max_position_embeddings")
    return float(base), RotaryScaling(rope_type=kind, factor=number(parameters, path, "factor", float), **rest)


def plan(config: DecoderConfig, family: Family) -> Conversion:
    """Plan the conversion of a Hugging Face folder.

    Raises:
        ValueError: the input does not fit.
    """
    path = config.input / "config.json"
    arch = read_architecture(read_json(path), path, family)
    weights = open_folder(config.input)
    both = ("model.embed_tokens.weight", "lm_head.weight")
    if arch.share_embeddings_and_output_weights and both[1] in weights.headers and not are_equal(weights, *both):
        raise ValueError(
            f"{path} ties {both[1]} to {both[0]}, but the two are there and differ: set tie_word_embeddings to false "
            "if the model was trained so"
        )
    return conversion(config, family, arch, weights, weight_map(arch))


def conversion(
    config: DecoderConfig,
    family: Family,
    arch: LanguageArch,
    weights: Weights,
    rows: tuple[Move | Drop, ...],
    *more_notes: str,
) -> Conversion:
    """The plan, once the architecture and the map stand.

    Raises:
        ValueError: the weights or the tokenizer do not fit.
    """
    tensors, dropped = apply(rows, arch.num_layers, weights, config.dtype)
    tokenizer = find_tokenizer(config.tokenizer or config.input, arch.vocab_size)
    if config.tokenizer and not tokenizer:
        raise ValueError(f"--tokenizer {config.tokenizer} holds no tokenizer: {', '.join(TOKENIZER_FILES)}")
    return Conversion(
        architecture=Architecture(language=arch, conversation=config.conversation or family.conversation),
        tensors=tensors,
        dropped=dropped,
        files=weights.files,
        references=(config.input,),
        tokenizer=tokenizer,
        notes=(*notes(arch, tokenizer), *more_notes),
    )


def are_equal(weights: Weights, first: str, second: str) -> bool:
    """Whether two tensors hold the same values."""
    return weights.headers[first] == weights.headers[second] and torch.equal(weights.read(first), weights.read(second))


def notes(arch: LanguageArch, tokenizer: tuple[Path, ...]) -> tuple[str, ...]:
    """Lines of the report: what the weights do not tell, and so should be looked at."""
    scaling = arch.rotary_scaling
    stretched = f" ({scaling.rope_type} scaling by {scaling.factor:g})" if scaling else ""
    window = f", a window of {arch.sliding_window} tokens" if arch.sliding_window else ""
    return (
        f"{arch.num_layers} layers, width {arch.hidden_size}, {arch.num_attention_heads} heads in "
        f"{arch.num_query_groups} groups, rotary base {arch.rotary_base:g}{stretched}{window}",
        f"vocabulary of {arch.vocab_size}, padded by {arch.padded_vocab_size - arch.vocab_size} rows of zeros",
        f"tokenizer: {', '.join(path.name for path in tokenizer) or 'none in the folder'}",
    )
