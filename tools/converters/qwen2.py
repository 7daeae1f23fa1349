"""Convert a Qwen2 or Qwen2.5 language model from its Hugging Face folder, with its tokenizer.

`python tools/converters/qwen2.py --input Qwen2.5-7B-Instruct --output language`
"""

import sys
from dataclasses import dataclass

import decoder
from command_line import run
from conversion import carry_out

FAMILY = decoder.Family(
    model_type="qwen2",
    conversation="chatml",
    add_qkv_bias=True,  # always, and on no other projection (transformers modeling_qwen2.py)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Config(decoder.DecoderConfig):
    """Convert a Qwen2 or Qwen2.5 language model from its Hugging Face folder, with its tokenizer."""


def convert(config: Qwen2Config) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    return carry_out(config, decoder.plan(config, FAMILY), *config.inputs)


if __name__ == "__main__":
    sys.exit(run(Qwen2Config, convert))
