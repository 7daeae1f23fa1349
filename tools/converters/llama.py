"""Convert a LLaMA 2 or 3.x language model, or one tuned from it such as Vicuna, with its tokenizer.

`python tools/converters/llama.py --input vicuna-7b-v1.5 --conversation vicuna_v1 --output language`

Takes the Hugging Face folder, or Meta's own with params.json and consolidated weights.
"""

import sys
from dataclasses import dataclass, replace

import consolidated
import decoder
from command_line import run
from conversion import Conversion, ConverterConfig, carry_out

FAMILY = decoder.Family(
    model_type="llama",
    conversation="llama2_chat",
    # transformers LlamaConfig; the folders of LLaMA 2 and Vicuna came without rope_theta.
    default_rotary_base=10_000.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ConverterConfig):
    """Convert a LLaMA 2 or 3.x language model, or one tuned from it such as Vicuna, with its tokenizer."""

    conversation: str = ""
    """Template it was tuned with, e.g. vicuna_v1; by default llama3 where the vocabulary is LLaMA 3's, else
    llama2_chat."""


def plan(config: LlamaConfig) -> Conversion:
    """Plan the conversion.

    Raises:
        ValueError: the input does not fit.
    """
    if consolidated.is_consolidated(config.input):
        conversion = consolidated.plan(config, FAMILY)
    else:
        conversion = decoder.plan(config, FAMILY)
    architecture = conversion.architecture
    assert architecture.language is not None
    by_vocabulary = "llama3" if architecture.language.vocab_size >= 128_000 else FAMILY.conversation
    return replace(conversion, architecture=replace(architecture, conversation=config.conversation or by_vocabulary))


def convert(config: LlamaConfig) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    return carry_out(config, plan(config), config.input)


if __name__ == "__main__":
    sys.exit(run(LlamaConfig, convert))
