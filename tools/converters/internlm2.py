"""Convert an InternLM2 or MOSS2 language model from its Hugging Face folder, with its tokenizer.

`python tools/converters/internlm2.py --input moss2-2_5b-chat --output language`

The code that comes with these folders is never run. What it computes is a LLaMA whose query, key and
value are one tensor, so the model leaves as a LLaMA, which transformers loads without that code.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decoder
from command_line import run
from conversion import Conversion, carry_out
from layout import keep
from weight_files import open_folder, read_json
from weight_map import Drop

from mmcore.models.architecture import LanguageArch

# As their config.json have them, whatever the case. LLaVA-MOSS2 keeps the language model's configuration as its own.
MODEL_TYPES = ("internlm2", "moss2", "llava_moss2")

FAMILY = decoder.Family(
    model_type="llama",
    conversation="internlm2",
    default_rotary_base=10_000.0,  # internlm/internlm2-7b configuration_internlm2.py
)

# internlm/internlm2-7b modeling_internlm2.py; Callione/LLaVA-MOSS2 modeling_moss2.py is the same.
NAMES = decoder.Names(
    word_embeddings="model.tok_embeddings",
    attention_norm="model.layers.{}.attention_norm",
    # By key-value head: its queries, its key, its value, which is mcore's order too.
    qkv=("model.layers.{}.attention.wqkv",),
    attention_output="model.layers.{}.attention.wo",
    mlp_norm="model.layers.{}.ffn_norm",
    gate="model.layers.{}.feed_forward.w1",
    up="model.layers.{}.feed_forward.w3",
    down="model.layers.{}.feed_forward.w2",
    final_norm="model.norm",
    head="output",
    dropped=(
        Drop("model.layers.*.attention.rotary_emb.inv_freq", "computed from the rotary base"),
        Drop("model.vision_tower.*", "vision tower: clip.py converts it"),
        Drop("model.mm_projector.*", "projector: combine.py takes it by --projector-weights"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InternLM2Config(decoder.DecoderConfig):
    """Convert an InternLM2 or MOSS2 language model from its Hugging Face folder, with its tokenizer."""


def read_architecture(config: dict[str, Any], path: Path) -> LanguageArch:
    """The architecture that a config.json describes, as that of a LLaMA.

    Args:
        path: where it was read, for messages.
    Raises:
        ValueError: another model, a value is missing, or it asks for what is not supported.
    """
    if str(config.get("model_type")).lower() not in MODEL_TYPES:
        raise ValueError(
            f"{path}: model_type is {config.get('model_type')!r}; this converter takes {', '.join(MODEL_TYPES)}"
        )
    if config.get("bias", True):  # the default of both configuration classes
        raise ValueError(
            f"{path}: bias is {config.get('bias', 'missing, which means true')}; a bias on wo is not supported"
        )
    return decoder.read_architecture({**config, "model_type": FAMILY.model_type}, path, FAMILY)


def plan(config: InternLM2Config) -> Conversion:
    """Plan the conversion.

    Raises:
        ValueError: the input does not fit.
    """
    path = config.input / "config.json"
    arch = read_architecture(read_json(path), path)
    rows = decoder.weight_map(arch, NAMES, keep)
    return decoder.conversion(config, FAMILY, arch, open_folder(config.input), rows)


def convert(config: InternLM2Config) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    return carry_out(config, plan(config), *config.inputs)


if __name__ == "__main__":
    sys.exit(run(InternLM2Config, convert))
