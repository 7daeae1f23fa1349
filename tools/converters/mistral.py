"""Convert a Mistral language model from its Hugging Face folder, with its tokenizer.

`python tools/converters/mistral.py --input Mistral-7B-Instruct-v0.3 --output language`
"""

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint_folder import new_folder, write_checkpoint
from command_line import run, summary
from layout import group_qkv, pad_rows, stack_rows
from sentencepiece import SentencePieceProcessor
from weight_files import open_folder, read_json
from weight_map import Drop, Move, apply

from mmcore.constants import LANGUAGE_MODEL, TOKENIZER_DIR
from mmcore.models.presets import Architecture, LanguageArch, save_architecture

SENTENCEPIECE_FILES = ("tokenizer.model", "tokenizer.model.v3")
TOKENIZER_FILES = (*SENTENCEPIECE_FILES, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralConfig:
    """Convert a Mistral language model from its Hugging Face folder, with its tokenizer."""

    input: Path
    """Hugging Face folder: config.json, weights, tokenizer."""
    output: Path
    """Folder to write: model.json, a distributed checkpoint, tokenizer/."""
    overwrite: bool = False
    """Replace a checkpoint that is at the output."""


def weight_map(arch: LanguageArch) -> tuple[Move | Drop, ...]:
    """From Hugging Face's names.

    Source: transformers models/mistral/modeling_mistral.py.
    """
    h, f, v = arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size
    query, kv = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    block, layers = "model.layers.{}.", f"{LANGUAGE_MODEL}.decoder.layers."
    pad = partial(pad_rows, rows=arch.padded_vocab_size)
    if arch.share_embeddings_and_output_weights:
        head: Move | Drop = Drop("lm_head.weight", "tied: the embedding takes its place")
    else:
        head = Move(f"{LANGUAGE_MODEL}.output_layer.weight", {"lm_head.weight": (v, h)}, pad)
    return (
        Move(f"{LANGUAGE_MODEL}.embedding.word_embeddings.weight", {"model.embed_tokens.weight": (v, h)}, pad),
        Move(f"{layers}self_attention.linear_qkv.layer_norm_weight", {f"{block}input_layernorm.weight": (h,)}),
        Move(
            f"{layers}self_attention.linear_qkv.weight",
            {
                f"{block}self_attn.q_proj.weight": (query, h),
                f"{block}self_attn.k_proj.weight": (kv, h),
                f"{block}self_attn.v_proj.weight": (kv, h),
            },
            partial(group_qkv, num_query_groups=arch.num_query_groups),
        ),
        Move(f"{layers}self_attention.linear_proj.weight", {f"{block}self_attn.o_proj.weight": (h, query)}),
        Move(f"{layers}mlp.linear_fc1.layer_norm_weight", {f"{block}post_attention_layernorm.weight": (h,)}),
        Move(
            f"{layers}mlp.linear_fc1.weight",
            {f"{block}mlp.gate_proj.weight": (f, h), f"{block}mlp.up_proj.weight": (f, h)},
            stack_rows,
        ),
        Move(f"{layers}mlp.linear_fc2.weight", {f"{block}mlp.down_proj.weight": (h, f)}),
        Move(f"{LANGUAGE_MODEL}.decoder.final_layernorm.weight", {"model.norm.weight": (h,)}),
        head,
        Drop("model.layers.*.self_attn.rotary_emb.inv_freq", "computed from rope_theta"),
    )


def read_architecture(path: Path) -> LanguageArch:
    """The architecture that a config.json describes.

    Raises:
        ValueError: not a Mistral, a value is missing, or it asks for what is not supported.
    """
    config = read_json(path)

    def value(name: str, kind: type = int) -> Any:
        found: Any = config.get(name)
        is_number = isinstance(found, kind) and not isinstance(found, bool)
        if not is_number or found <= 0:
            raise ValueError(f"{path}: {name!r} must be a number above 0 ({kind.__name__}), not {found!r}")
        return found

    if config.get("model_type") != "mistral":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; this converter takes 'mistral'")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act is {config['hidden_act']!r}; only 'silu' is supported")
    # transformers reads a missing key as 4096.
    if config.get("sliding_window", 4096) is not None:
        raise ValueError(
            f"{path}: sliding_window is {config.get('sliding_window', 'missing, which means 4096')}; only models that "
            "attend to the whole sequence (null, as in Mistral 7B v0.2 and v0.3) are supported"
        )
    hidden, heads = value("hidden_size"), value("num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return LanguageArch(
        num_layers=value("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=value("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=value("num_key_value_heads"),
        kv_channels=hidden // heads if config.get("head_dim") is None else value("head_dim"),
        vocab_size=value("vocab_size"),
        max_position_embeddings=value("max_position_embeddings"),
        rotary_base=_rotary_base(config, path),
        layernorm_epsilon=value("rms_norm_eps", float),
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
    )


def _rotary_base(config: dict[str, Any], path: Path) -> float:
    """transformers 5 writes rope_parameters; before it, rope_theta stood alone and rope_scaling beside it."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    base: Any = parameters.get("rope_theta", config.get("rope_theta"))
    if kind != "default":
        raise ValueError(f"{path}: rope_type is {kind!r}; scaled rotary embeddings are not supported")
    if isinstance(base, bool) or not isinstance(base, int | float) or base <= 0:
        raise ValueError(
            f"{path}: neither rope_parameters.rope_theta nor rope_theta is a number above 0 (found {base!r}); no base "
            "is assumed, for a wrong one converts without an error and answers nonsense"
        )
    return float(base)


def tokenizer_size(path: Path) -> int:
    """Number of ids a tokenizer file can produce.

    Raises:
        ValueError: it cannot be read.
    """
    if path.name in SENTENCEPIECE_FILES:
        try:
            return SentencePieceProcessor(model_file=str(path)).vocab_size()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read as a sentencepiece model ({error})") from None
    content = read_json(path)
    try:
        pieces = content["model"]["vocab"]
        ids = list(pieces.values()) if isinstance(pieces, dict) else list(range(len(pieces)))
        return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer of the tokenizers library ({error!r})") from None


def check_tokenizers(folder: Path, vocab_size: int) -> list[Path]:
    """The tokenizer files of a folder.

    Raises:
        ValueError: one of them has ids that the embedding has no rows for.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for path in files:
        if path.name in (*SENTENCEPIECE_FILES, "tokenizer.json") and (size := tokenizer_size(path)) > vocab_size:
            raise ValueError(
                f"{path} has {size} pieces but {folder / 'config.json'} says vocab_size {vocab_size}: the tokenizer is "
                "of another model"
            )
    return files


def convert(config: MistralConfig) -> list[str]:
    """Write the checkpoint.

    Returns:
        Lines that tell what was done.
    Raises:
        ValueError: the input does not fit, or the output is taken.
    """
    arch = read_architecture(config.input / "config.json")
    tokenizers = check_tokenizers(config.input, arch.vocab_size)
    weights = open_folder(config.input)
    tensors, dropped = apply(weight_map(arch), arch.num_layers, weights)
    with new_folder(config.output, config.overwrite, config.input) as folder:
        (folder / TOKENIZER_DIR).mkdir()
        for path in tokenizers:
            shutil.copy(path, folder / TOKENIZER_DIR)
        write_checkpoint(folder, tensors)
        save_architecture(Architecture(language=arch, sources=weights.sources()), folder)
    padding = arch.padded_vocab_size - arch.vocab_size
    return [
        *summary(config.output, tensors, dropped),
        f"  {arch.num_layers} layers, width {arch.hidden_size}, {arch.num_attention_heads} heads in "
        f"{arch.num_query_groups} groups, rotary base {arch.rotary_base:g}",
        f"  vocabulary of {arch.vocab_size}, padded by {padding} rows of zeros",
        f"  tokenizer: {', '.join(path.name for path in tokenizers) or 'none in the folder'}",
    ]


if __name__ == "__main__":
    sys.exit(run(MistralConfig, convert))
