"""Join a vision and a language checkpoint by a projector, new or trained.

`python tools/converters/combine.py --vision vision --language language --output model`
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import projector
from checkpoint_folder import StoredTensor, stored_tensors
from command_line import run
from conversion import Conversion, OutputConfig, carry_out
from picture_processors import places
from weight_files import open_file
from weight_map import apply

from mmcore.constants import LANGUAGE_MODEL, MODEL_FILE, TOKENIZER_DIR, VISION_MODEL
from mmcore.models.architecture import (
    Architecture,
    LanguageArch,
    PictureArch,
    ProjectorArch,
    VisionArch,
    load_architecture,
)
from mmcore.models.presets import PROJECTOR, compose, default_pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineConfig(OutputConfig):
    """Join a vision and a language checkpoint by a projector, new or trained."""

    vision: Path
    """Checkpoint folder with a vision tower: clip.py's, or any other."""
    language: Path
    """Checkpoint folder with a language model and its tokenizer: mistral.py's, or any other."""
    projector: Literal["mlp2x_gelu", "linear", "megatron_mlp"] = "mlp2x_gelu"
    """LLaVA-1.5's two layers, LLaVA-1's one, or those of Megatron-LM's Mistral recipe."""
    projector_ffn_hidden_size: int = 0
    """Width between the two layers; 0 is the projector's own choice."""
    projector_bias: Literal["", "true", "false"] = ""
    """Whether its layers have a bias; by default the projector's own choice."""
    projector_weights: Path | None = None
    """A trained projector of LLaVA's (mm_projector.bin) instead of a new one; its shapes say what it is."""
    seed: int = 1234
    """Seed of a new projector's weights."""
    image_mode: Literal["", "crop", "pad", "squash"] = ""
    """What becomes of pictures that are not square: their middle, a margin, or other proportions; by default what the
    vision tower saw, crop for CLIP and squash for SigLIP."""
    tiling: Literal["none", "anyres", "dynamic"] = "none"
    """Whether pictures are cut into tiles, as LLaVA-NeXT does, or as InternVL and NVLM."""
    grid_pinpoints: tuple[str, ...] = ()
    """anyres: HEIGHTxWIDTH in pixels that the tiles may cover together; by default LLaVA-NeXT's, of 2 to 4 tiles."""
    max_num_tiles: int = 0
    """dynamic: most tiles of a picture; 0 is InternVL's, 12."""
    tile_tags: bool = False
    """dynamic: text before each tile tells which it is, as in NVLM."""


def _towers(config: CombineConfig) -> tuple[Architecture, VisionArch, LanguageArch]:
    vision, language = load_architecture(config.vision), load_architecture(config.language)
    if vision.vision is None:
        raise ValueError(f"--vision {config.vision}: its {MODEL_FILE} has no vision tower; take what clip.py wrote")
    if language.language is None:
        raise ValueError(
            f"--language {config.language}: its {MODEL_FILE} has no language model; take what mistral.py wrote"
        )
    known = replace(language, sources=(*vision.sources, *language.sources))
    return known, vision.vision, language.language


def _new(config: CombineConfig, vision: VisionArch, language: LanguageArch) -> tuple[ProjectorArch, str]:
    arch = PROJECTOR[config.projector](language)
    if config.projector_ffn_hidden_size:
        arch = replace(arch, ffn_hidden_size=config.projector_ffn_hidden_size)
    if config.projector_bias:
        arch = replace(arch, add_bias_linear=config.projector_bias == "true")
    return arch, f"projector {config.projector}, from seed {config.seed}"


# Rows and columns of LLaVA-NeXT's grids.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
MAX_NUM_TILES = 12


def _pictures(config: CombineConfig, vision: VisionArch) -> PictureArch:
    mode = config.image_mode or ("squash" if config.tiling != "none" else default_pictures(vision).mode)
    pinpoints = tuple(_pinpoint(text) for text in config.grid_pinpoints)
    most = config.max_num_tiles
    if config.tiling == "anyres" and not pinpoints:
        pinpoints = tuple((rows * vision.image_size, columns * vision.image_size) for rows, columns in GRIDS)
    if config.tiling == "dynamic" and not most:
        most = MAX_NUM_TILES
    return PictureArch(
        mode=mode, tiling=config.tiling, grid_pinpoints=pinpoints, max_num_tiles=most, tile_tags=config.tile_tags
    )


def _pinpoint(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--grid-pinpoints {text} is not HEIGHTxWIDTH, such as 336x672")
    return int(height), int(width)


def plan(config: CombineConfig) -> Conversion:
    """Plan the joining.

    Raises:
        ValueError: the inputs do not fit.
    """
    known, vision, language = _towers(config)
    dropped: Counter[str] = Counter()
    files: tuple[Path, ...] = ()
    between: dict[str, StoredTensor]
    if config.projector_weights:
        if config.projector_ffn_hidden_size or config.projector_bias:
            raise ValueError("--projector-weights has its own width and bias: leave out the options that give them")
        weights = open_file(config.projector_weights)
        trained = weights.renamed(projector.canonical_name)
        arch = projector.read_architecture(trained)
        rows = projector.weight_map(arch, vision.hidden_size, language.hidden_size, projector.LLAVA)
        between, _ = apply(rows, 1, trained)
        if others := len(weights.headers) - len(trained.headers):
            dropped["not the projector's"] = others
        files, origin = weights.files, f"projector of {config.projector_weights.name}"
    else:
        arch, origin = _new(config, vision, language)
        between = projector.initial_projector(arch, vision.hidden_size, language.hidden_size, config.seed)
    pictures = _pictures(config, vision)
    if pictures.has_newline:
        between |= projector.initial_newline(language.hidden_size, config.seed)
    whole = compose(vision, language, arch, pictures=pictures, conversation=known.conversation, sources=known.sources)
    towers = stored_tensors(config.vision, VISION_MODEL) | stored_tensors(config.language, LANGUAGE_MODEL)
    tokenizer = config.language / TOKENIZER_DIR
    return Conversion(
        architecture=whole,
        tensors=towers | between,
        dropped=dropped,
        files=files,
        tokenizer=tuple(sorted(tokenizer.iterdir())) if tokenizer.is_dir() else (),
        notes=(
            f"{origin}: " + ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in between.items()),
            f"image token {whole.image_token_id}; {vision.num_image_embeddings} for {places(pictures)}",
        ),
    )


def convert(config: CombineConfig) -> list[str]:
    """Write the checkpoint; returns lines that tell what was done."""
    return carry_out(config, plan(config), config.vision, config.language)


if __name__ == "__main__":
    sys.exit(run(CombineConfig, convert))
