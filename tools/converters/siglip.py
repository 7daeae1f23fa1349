"""Convert the vision tower of a SigLIP or SigLIP 2 from its Hugging Face folder.

`python tools/converters/siglip.py --input siglip-so400m-patch14-384 --output vision`

SigLIP 2 at fixed resolution is the same architecture; its NaFlex models, which take pictures of any
shape, are another and are refused.
"""

import sys
from dataclasses import dataclass

import encoder
from command_line import run
from conversion import Conversion, ConverterConfig, carry_out
from weight_files import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class SiglipConfig(ConverterConfig):
    """Convert the vision tower of a SigLIP or SigLIP 2 from its Hugging Face folder."""

    feature_layer: int = -2
    """Hidden state that feeds the projector: -1 is the last layer's, -2 the one before it."""


def plan(config: SiglipConfig) -> Conversion:
    """Plan the conversion.

    Raises:
        ValueError: the input does not fit.
    """
    path = config.input / "config.json"
    content = read_json(path)
    if str(content.get("model_type")).startswith("siglip2"):
        raise ValueError(
            f"{path}: model_type is {content['model_type']!r}, a NaFlex model with pictures of any shape, which is not "
            "supported: take one of a fixed resolution, such as siglip2-so400m-patch14-384"
        )
    arch = encoder.read_architecture(content, path, encoder.SIGLIP, config.feature_layer)
    return encoder.plan(config, arch, encoder.open_tower(config.input), encoder.weight_map(arch))


def convert(config: SiglipConfig) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    return carry_out(config, plan(config), config.input)


if __name__ == "__main__":
    sys.exit(run(SiglipConfig, convert))
