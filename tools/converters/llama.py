"""Convert a LLaMA 2 or 3.x language model, or one tuned from it such as Vicuna, with its tokenizer.

`python tools/converters/llama.py --input vicuna-7b-v1.5 --conversation vicuna_v1 --output language`

Takes the Hugging Face folder, or Meta's own with params.json and consolidated weights.
"""

import sys
from dataclasses import dataclass, replace

import consolidated
import decoder
from command_line import run
from conversion import Conversion, carry_out

FAMILY = decoder.Family(
    model_type="llama",
    conversation="llama2_chat",
    # transformers LlamaConfig; the folders of LLaMA 2 and Vicuna came without rope_theta.
    default_rotary_base=10_000.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(decoder.DecoderConfig):
    """Convert a LLaMA 2 or 3.x language model, or one tuned from it such as Vicuna, with its tokenizer."""

    conversation: str = ""
    """Conversation template it was tuned with, e.g. vicuna_v1; by default llama3 where the vocabulary is
    LLaMA 3's, else llama2_chat."""
    max_position_embeddings: int | None = None
    """Positions of a model in Meta's layout, which does not hold them; by default those of LLaMA 2, 3 and 3.x."""
    rotary_scaling_factor: float | None = None
    """Of a model in Meta's layout that has scaled rotary embeddings: 8 for LLaMA 3.1 and 3.3, 32 for 3.2's 1B
    and 3B."""


def plan(config: LlamaConfig) -> Conversion:
    """Plan the conversion.

    Raises:
        ValueError: the input does not fit.
    """
    options = (config.max_position_embeddings, config.rotary_scaling_factor)
    if config.max_position_embeddings is not None and config.max_position_embeddings < 1:
        raise ValueError(f"--max-position-embeddings must be at least 1, not {config.max_position_embeddings}")
    if consolidated.is_consolidated(config.input):
        conversion = consolidated.plan(config, FAMILY, *options)
    elif options == (None, None):
        conversion = decoder.plan(config, FAMILY)
    else:
        raise ValueError(
            "--max-position-embeddings and --rotary-scaling-factor are for Meta's own layout (params.json), which does "
            f"not tell; {config.input / 'config.json'} does: leave them out"
        )
    architecture = conversion.architecture
    assert architecture.language is not None
    by_vocabulary = "llama3" if architecture.language.vocab_size >= 128_000 else FAMILY.conversation
    return replace(conversion, architecture=replace(architecture, conversation=config.conversation or by_vocabulary))


def convert(config: LlamaConfig) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    return carry_out(config, plan(config), *config.inputs)


if __name__ == "__main__":
    sys.exit(run(LlamaConfig, convert))
