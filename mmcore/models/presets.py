"""Named architectures with their sources, and the check of a run's presets against its checkpoint.

Imports no torch: the command line reads it in milliseconds.
"""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmcore.checks import nearest
from mmcore.config import ModelConfig
from mmcore.constants import MODEL_FILE, SIGLIP_IMAGE_MEAN, SIGLIP_IMAGE_STD
from mmcore.models.architecture import (
    Architecture,
    LanguageArch,
    PictureArch,
    ProjectorArch,
    RotaryScaling,
    VisionArch,
    load_architecture,
    newest,
)

# What all of SigLIP have in common (transformers SiglipVisionConfig, SiglipImageProcessor).
siglip = partial(
    VisionArch,
    model_subtype="siglip",
    activation="gelu_tanh",
    layernorm_epsilon=1e-6,
    image_mean=SIGLIP_IMAGE_MEAN,
    image_std=SIGLIP_IMAGE_STD,
)

VISION = {
    # OpenAI CLIP, model cards; HF openai/clip-vit-* config.json.
    "clip_vit_b_16": VisionArch(
        num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12, image_size=224, patch_dim=16
    ),
    "clip_vit_l_14": VisionArch(
        num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, image_size=224, patch_dim=14
    ),
    "clip_vit_l_14_336": VisionArch(
        num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, image_size=336, patch_dim=14
    ),
    # laion/CLIP-ViT-H-14-laion2B-s32B-b79K config.json.
    "clip_vit_h_14": VisionArch(
        num_layers=32,
        hidden_size=1280,
        ffn_hidden_size=5120,
        num_attention_heads=16,
        image_size=224,
        patch_dim=14,
        activation="gelu",
    ),
    # google/siglip-base-patch16-224 config.json; siglip2-base-patch16-224 is the same.
    "siglip_base_patch16_224": siglip(
        num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12, image_size=224, patch_dim=16
    ),
    # google/siglip-so400m-patch14-384 config.json; siglip2-so400m-patch14-384 is the same.
    "siglip_so400m_patch14_384": siglip(
        num_layers=27, hidden_size=1152, ffn_hidden_size=4304, num_attention_heads=16, image_size=384, patch_dim=14
    ),
}

_MISTRAL_7B_V03 = LanguageArch(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=32768,
    max_position_embeddings=32768,
    rotary_base=1_000_000.0,
)
_LLAMA2_7B = LanguageArch(
    model_type="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    vocab_size=32000,
    max_position_embeddings=4096,
)
_LLAMA2_13B = replace(
    _LLAMA2_7B,
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=13824,
    num_attention_heads=40,
    num_query_groups=40,
)
_LLAMA3_8B = replace(
    _MISTRAL_7B_V03, model_type="llama", vocab_size=128256, max_position_embeddings=8192, rotary_base=500_000.0
)

LANGUAGE = {
    # mistralai/Mistral-7B-v0.1, Mistral-7B-Instruct-v0.2, Mistral-7B-v0.3 config.json.
    "mistral_7b_v01": replace(_MISTRAL_7B_V03, vocab_size=32000, rotary_base=10_000.0, sliding_window=4096),
    "mistral_7b_v02": replace(_MISTRAL_7B_V03, vocab_size=32000),
    "mistral_7b_v03": _MISTRAL_7B_V03,
    # meta-llama/Llama-2-{7,13}b-hf config.json; lmsys/vicuna-{7,13}b-v1.5 are tuned from them.
    "llama2_7b": _LLAMA2_7B,
    "llama2_13b": _LLAMA2_13B,
    "vicuna_7b_v15": _LLAMA2_7B,
    "vicuna_13b_v15": _LLAMA2_13B,
    # meta-llama/Meta-Llama-3-8B and Llama-3.1-8B config.json.
    "llama3_8b": _LLAMA3_8B,
    "llama31_8b": replace(
        _LLAMA3_8B, max_position_embeddings=131072, rotary_scaling=RotaryScaling(rope_type="llama3", factor=8.0)
    ),
    # config.json of fnlp/moss2-2_5b-chat, as Callione/LLaVA-MOSS2's README prints it.
    "moss2_2_5b": LanguageArch(
        model_type="llama",  # as tools/converters/internlm2.py brings it in
        num_layers=32,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=16,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=137728,
        max_position_embeddings=32768,
        rotary_base=1_000_000.0,
        rotary_scaling=RotaryScaling(rope_type="dynamic", factor=2.0),
    ),
    # Qwen/Qwen2.5-7B-Instruct config.json.
    "qwen25_7b_instruct": LanguageArch(
        model_type="qwen2",
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=152064,
        max_position_embeddings=32768,
        rotary_base=1_000_000.0,
        layernorm_epsilon=1e-6,
        add_qkv_bias=True,
    ),
}

PROJECTOR = {
    # LLaVA-1.5: two layers at the language model's width.
    "mlp2x_gelu": lambda language: ProjectorArch(ffn_hidden_size=language.hidden_size),
    # LLaVA-1: one linear layer.
    "linear": lambda language: ProjectorArch(projector_type="affine"),
    # Megatron-LM's Mistral recipe: as wide inside as the language model's MLP, no bias.
    "megatron_mlp": lambda language: ProjectorArch(ffn_hidden_size=language.ffn_hidden_size, add_bias_linear=False),
}


def default_pictures(vision: VisionArch) -> PictureArch:
    """Pictures as the vision tower saw them when it was trained."""
    return PictureArch(mode="squash" if vision.model_subtype == "siglip" else "crop")


def compose(vision: VisionArch, language: LanguageArch, projector: ProjectorArch, **rest: Any) -> Architecture:
    """Join the parts; the image token is the first id that the tokenizer does not have."""
    parts = {"vision": vision, "vision_projection": projector, "language": language}
    known = {"image_token_id": language.vocab_size, "pictures": default_pictures(vision)}
    return Architecture(**{**parts, **known, **rest})


def preset(table: dict[str, Any], name: str, option: str) -> Any:
    """Look `name` up in `table`.

    Raises:
        ValueError: no such preset; names the nearest one.
    """
    if name not in table:
        raise ValueError(
            f"--model.{option} {name!r} is not a preset{nearest(name, table)}; there are: {', '.join(table)}"
        )
    return table[name]


def resolve_architecture(model: ModelConfig) -> Architecture:
    """The architecture of the checkpoint that a run starts from, checked against the recipe's presets.

    Raises:
        ValueError: there is no checkpoint, it lacks a part, a preset does not exist, or a preset and
            the checkpoint contradict each other (both values are named).
    """
    if not model.checkpoint and model.weights == "random":
        return _from_presets(model)
    if not model.checkpoint:
        raise ValueError("no model: give --model.checkpoint, a folder that tools/converters/combine.py or a run wrote")
    found = load_architecture(newest(Path(model.checkpoint)))
    parts = ("vision", "vision_projection", "language")
    if missing := [part for part in parts if getattr(found, part) is None]:
        raise ValueError(
            f"{model.checkpoint}/{MODEL_FILE} has no {' and no '.join(missing)}: "
            "join the towers first with tools/converters/combine.py"
        )
    if model.vision:
        assert found.vision is not None
        # Which features are taken is a choice of the checkpoint: LLaVA's and Megatron-LM's differ on the same tower.
        own = {name: getattr(found.vision, name) for name in ("feature_layer", "drop_class_token")}
        wanted = replace(preset(VISION, model.vision, "vision"), **own)
        check_same(found.vision, wanted, "vision tower", model.checkpoint)
    if model.language:
        check_same(found.language, preset(LANGUAGE, model.language, "language"), "language model", model.checkpoint)
    if model.projector:
        wanted = preset(PROJECTOR, model.projector, "projector")(found.language)
        check_same(found.vision_projection, wanted, "projector", model.checkpoint)
    return found


def _from_presets(model: ModelConfig) -> Architecture:
    if not (model.vision and model.language and model.projector):
        raise ValueError(
            "--model.weights random without --model.checkpoint: give --model.vision, --model.language and "
            "--model.projector, presets of mmcore.models.presets, or take a recipe that does"
        )
    language = preset(LANGUAGE, model.language, "language")
    return compose(
        preset(VISION, model.vision, "vision"), language, preset(PROJECTOR, model.projector, "projector")(language)
    )


def check_same(found: Any, wanted: Any, part: str, where: str) -> None:
    """Raise a ValueError that names both values of every field in which two parts differ."""
    if found == wanted:
        return
    differing = [
        f"{field.name}: {getattr(found, field.name)} in the checkpoint, {getattr(wanted, field.name)} in the preset"
        for field in fields(wanted)
        if getattr(found, field.name) != getattr(wanted, field.name)
    ]
    raise ValueError(
        f"the {part} of {where} is not the one that this run is for ({'; '.join(differing)}): "
        "take the recipe of that model, or another checkpoint"
    )
