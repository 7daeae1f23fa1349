"""Convert a whole LLaVA: the hub's llava-hf folder, or one as LLaVA's own training leaves it.

`python tools/converters/llava.py --input llava-1.5-7b-hf --output model`
`python tools/converters/llava.py --input llava-v1.5-7b --vision-tower clip-vit-large-patch14-336 --output model`

LLaVA's own folders name their vision tower and do not hold it.
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import decoder
import encoder
import llama
import mistral
import original_llava
import qwen2
from checkpoint_folder import StoredTensor
from command_line import run
from conversion import Conversion, ConverterConfig, carry_out
from hugging_face import apply_parts, canonical_name, parts
from tokenizer_files import find_tokenizer
from weight_files import open_folder, read_json

from mmcore.models.architecture import Architecture, LanguageArch, ProjectorArch, VisionArch

# Files of a llava-hf folder that say how it is used, beside its tokenizer's.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "generation_config.json")

FAMILIES = {family.model_type: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY)}

# Relatives whose pictures become another sequence than one block of patches.
RELATIVES = {
    "llava_next": "it cuts pictures into tiles, with learnt separators between their rows",
    "llava_next_video": "it takes videos, and tiles with learnt separators between their rows",
    "llava_onevision": "it cuts pictures into tiles, with learnt separators between their rows, and takes videos",
    "video_llava": "it takes videos, by a second vision tower",
    "vipllava": "its projector takes the features of several layers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaConfig(ConverterConfig):
    """Convert a whole LLaVA: the hub's llava-hf folder, or one as LLaVA's own training leaves it."""

    vision_tower: Path | None = None
    """The vision tower that LLaVA's own folder names, as clip.py and siglip.py take it; by default a folder of that
    name beside the input."""
    conversation: str = ""
    """Template it was tuned with; by default vicuna_v1 on LLaMA 2 (llama3 on LLaMA 3), mistral_instruct on Mistral,
    chatml on Qwen2."""
