"""Convert a Mistral language model, with its tokenizer.

`python tools/converters/mistral.py --input Mistral-7B-Instruct-v0.3 --output language`

Takes the Hugging Face folder, or Mistral's own with params.json and consolidated weights.
"""

import sys
from dataclasses import dataclass

import consolidated
import decoder
from command_line import run
from conversion import Conversion, carry_out

FAMILY = decoder.Family(
    model_type="mistral",
    conversation="mistral_instruct",
    default_sliding_window=4096,  # transformers MistralConfig
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralConfig(decoder.DecoderConfig):
    """Convert a Mistral language model, with its tokenizer."""


def plan(config: MistralConfig) -> Conversion:
    """Plan the conversion.

    Raises:
        ValueError: the input does not fit.
    """
    if consolidated.is_consolidated(config.input):
        return consolidated.plan(config, FAMILY)
    return decoder.plan(config, FAMILY)


def convert(config: MistralConfig) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    return carry_out(config, plan(config), *config.inputs)


if __name__ == "__main__":
    sys.exit(run(MistralConfig, convert))
