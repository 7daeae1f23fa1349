"""Architectures as data: what a model is, read from a preset or from a checkpoint's `model.json`.

Imports no torch: converters, the command line and the planner read it in milliseconds.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mmcore.config import ModelConfig, ParallelConfig, nearest
from mmcore.constants import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, MODEL_FILE, VOCAB_DIVISOR

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionArch:
    """A vision transformer as mcore's `CLIPViTModel` builds it."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    image_size: int
    """Height and width of the square input, in pixels (mcore's img_h and img_w)."""
    patch_dim: int
    """Height and width of a patch, in pixels."""
    model_subtype: Literal["clip"] = "clip"
    activation: Activation = "quick_gelu"
    layernorm_epsilon: float = 1e-5
    feature_layer: int = -2
    """Which hidden state feeds the projector: -1 is the last layer's, -2 the one before it."""
    drop_class_token: bool = True
    image_mean: tuple[float, float, float] = CLIP_IMAGE_MEAN
    image_std: tuple[float, float, float] = CLIP_IMAGE_STD

    def __post_init__(self) -> None:
        if self.image_size % self.patch_dim:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_dim {self.patch_dim}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if not -self.num_layers <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer {self.feature_layer} must lie between -{self.num_layers} and -1")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_dim) ** 2

    @property
    def num_image_embeddings(self) -> int:
        """Embeddings that one image puts into the language model's sequence."""
        return self.num_patches + (0 if self.drop_class_token else 1)

    @property
    def num_layers_run(self) -> int:
        """Layers whose output is needed; the ones above `feature_layer` are kept but never run."""
        return self.num_layers + 1 + self.feature_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorArch:
    """What carries vision features into the language model's width (mcore's `MultimodalProjector`)."""

    projector_type: Literal["mlp", "affine"] = "mlp"
    ffn_hidden_size: int = 0
    """Width between the two layers of "mlp"; unused (0) by "affine"."""
    add_bias_linear: bool = True
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        if (self.projector_type == "mlp") != (self.ffn_hidden_size > 0):
            raise ValueError(
                f"projector_type {self.projector_type!r} with ffn_hidden_size {self.ffn_hidden_size}: "
                "an mlp needs a positive width and an affine projector has none"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageArch:
    """A decoder-only language model as mcore's `GPTModel` builds it: RMSNorm, SwiGLU, RoPE."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads."""
    kv_channels: int
    """Channels of one head."""
    vocab_size: int
    """Rows of the tokenizer, unpadded."""
    max_position_embeddings: int
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-5
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding tables; the padding is never looked up and never predicted."""
        return -(-self.vocab_size // VOCAB_DIVISOR) * VOCAB_DIVISOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A whole model or one of its towers, as `model.json` holds it."""

    vision: VisionArch | None = None
    vision_projection: ProjectorArch | None = None
    language: LanguageArch | None = None
    image_token_id: int | None = None
    """Token that stands for one image embedding: outside the tokenizer, so that no text can make it."""
    conversation: str = "mistral_instruct"
    """Template of mmcore.data.conversation that the language model was tuned with."""
    sources: tuple[dict[str, str], ...] = ()
    """Files the weights came from: {"file": name, "sha256": hash}."""


VISION = {
    # OpenAI CLIP, model card of ViT-L/14@336px.
    "clip_vit_l_14_336": VisionArch(
        num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, image_size=336, patch_dim=14
    ),
}

LANGUAGE = {
    # mistralai/Mistral-7B-v0.3 config.json: v3 tokenizer, no sliding window.
    "mistral_7b_v03": LanguageArch(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=32768,
        max_position_embeddings=32768,
        rotary_base=1_000_000.0,
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


def compose(vision: VisionArch, language: LanguageArch, projector: ProjectorArch, **rest: Any) -> Architecture:
    """Join the parts; the image token is the first id that the tokenizer does not have."""
    return Architecture(
        vision=vision, vision_projection=projector, language=language, image_token_id=language.vocab_size, **rest
    )


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
        check_same(found.vision, preset(VISION, model.vision, "vision"), "vision tower", model.checkpoint)
    if model.language:
        check_same(found.language, preset(LANGUAGE, model.language, "language"), "language model", model.checkpoint)
    if model.projector:
        wanted = preset(PROJECTOR, model.projector, "projector")(found.language)
        check_same(found.vision_projection, wanted, "projector", model.checkpoint)
    return found


def newest(folder: Path) -> Path:
    """A checkpoint: the folder itself, or the newest one of the run that it holds.

    Raises:
        ValueError: it is neither.
    """
    if (folder / MODEL_FILE).is_file():
        return folder
    if found := checkpoints(folder):
        return found[-1]
    raise ValueError(f"{folder} is no checkpoint and holds none: give a folder that combine.py or mmcore train wrote")


def checkpoints(run: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("step_*") if (path / MODEL_FILE).is_file())


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


def check_layout(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Refuse a layout that the architecture cannot take.

    Raises:
        ValueError: tensor ranks do not divide the heads, key-value heads, MLP widths or the padded
            vocabulary, or stages do not divide the language model's layers.
    """
    size, vision, language = parallel.tensor_model_parallel_size, architecture.vision, architecture.language
    assert vision is not None and language is not None and architecture.vision_projection is not None
    widths = {
        "attention heads of the vision tower": vision.num_attention_heads,
        "MLP width of the vision tower": vision.ffn_hidden_size,
        "MLP width of the projector": architecture.vision_projection.ffn_hidden_size,
        "attention heads of the language model": language.num_attention_heads,
        "key-value heads of the language model": language.num_query_groups,
        "MLP width of the language model": language.ffn_hidden_size,
        "padded vocabulary of the language model": language.padded_vocab_size,
    }
    bad = [f"{name} ({width})" for name, width in widths.items() if width % size]
    if bad:
        raise ValueError(
            f"--parallel.tensor-model-parallel-size {size} does not divide the {', the '.join(bad)}: "
            "choose a size that divides them all"
        )
    stages = parallel.pipeline_model_parallel_size
    if language.num_layers % stages:
        raise ValueError(
            f"--parallel.pipeline-model-parallel-size {stages} does not divide the {language.num_layers} layers of "
            "the language model: choose a size that does"
        )


def save_architecture(architecture: Architecture, folder: Path) -> None:
    """Write `folder/model.json`."""
    content = {"format": 1, **asdict(architecture)}
    (folder / MODEL_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_architecture(folder: Path) -> Architecture:
    """Read `folder/model.json`.

    Raises:
        ValueError: the folder or file is missing, is not JSON, or holds a key that this version
            does not know.
    """
    path = folder / MODEL_FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: --checkpoint takes a folder that a converter, combine.py or mmcore train wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != 1:
        raise ValueError(f"{path} is not a model description of this version (format 1)")
    parts = {"vision": VisionArch, "vision_projection": ProjectorArch, "language": LanguageArch}
    try:
        for name, kind in parts.items():
            if content.get(name) is not None:
                content[name] = kind(**{key: _tuple(value) for key, value in content[name].items()})
        return Architecture(**{key: _tuple(value) for key, value in content.items()})
    except TypeError as error:
        raise ValueError(f"{path} does not describe a model of this version ({error})") from None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
