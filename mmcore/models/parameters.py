"""How many parameters an architecture has, counted without building it. Imports no torch."""

from mmcore.constants import LANGUAGE_MODEL, VISION_MODEL, VISION_PROJECTION
from mmcore.models.architecture import Architecture, LanguageArch, ProjectorArch, VisionArch


def num_parameters(architecture: Architecture) -> dict[str, int]:
    """Of each part that the architecture has, by its name in `mmcore.constants.MODULES`."""
    vision, projector, language = architecture.vision, architecture.vision_projection, architecture.language
    counts = {}
    if vision is not None:
        counts[VISION_MODEL] = _vision(vision)
    if projector is not None and vision is not None and language is not None:
        newline = language.hidden_size if architecture.pictures.has_newline else 0
        counts[VISION_PROJECTION] = _projector(projector, vision.hidden_size, language.hidden_size) + newline
    if language is not None:
        counts[LANGUAGE_MODEL] = _language(language)
    return counts


def _vision(arch: VisionArch) -> int:
    hidden, is_clip = arch.hidden_size, arch.has_class_token
    attention = 4 * hidden * hidden + 4 * hidden
    mlp = 2 * hidden * arch.ffn_hidden_size + arch.ffn_hidden_size + hidden
    layers = arch.num_layers * (attention + mlp + 4 * hidden)  # two norms, each with weight and bias
    patches = 3 * arch.patch_dim**2 * hidden + (0 if is_clip else hidden)
    norms = 2 * hidden * (2 if is_clip else 1)  # before the layers (CLIP) and after them
    return layers + patches + arch.num_positions * hidden + (hidden if is_clip else 0) + norms


def _projector(arch: ProjectorArch, wide: int, out: int) -> int:
    bias = int(arch.add_bias_linear)
    if arch.projector_type == "affine":
        return wide * out + bias * out
    return arch.ffn_hidden_size * (wide + out) + bias * (arch.ffn_hidden_size + out)


def _language(arch: LanguageArch) -> int:
    hidden = arch.hidden_size
    queries, keys = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    attention = hidden * (queries + 2 * keys) + queries * hidden + (queries + 2 * keys if arch.add_qkv_bias else 0)
    layer = attention + 3 * hidden * arch.ffn_hidden_size + 2 * hidden
    tables = 1 if arch.share_embeddings_and_output_weights else 2
    return arch.num_layers * layer + tables * arch.padded_vocab_size * hidden + hidden
