"""What a model is, as data: the architecture that `model.json` holds beside the weights.

Imports no torch: converters, the command line and the planner read it in milliseconds.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmcore.config import ParallelConfig
from mmcore.constants import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, MEGATRON_FILE, MODEL_FILE, VOCAB_DIVISOR
from mmcore.foreign import parse_json

# Of model.json. 2: the norm after a vision tower's last layer is kept.
FORMAT = 2

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
    model_subtype: Literal["clip", "siglip"] = "clip"
    """"clip" has a class token and a norm before its layers, "siglip" neither, but a bias on its patches."""
    activation: Activation = "quick_gelu"
    layernorm_epsilon: float = 1e-5
    feature_layer: int = -2
    """Which hidden state feeds the projector: -1 is the last layer's, -2 the one before it."""
    drop_class_token: bool = True
    """Whether the features leave out the class token, where there is one."""
    image_mean: tuple[float, float, float] = CLIP_IMAGE_MEAN
    image_std: tuple[float, float, float] = CLIP_IMAGE_STD

    def __post_init__(self) -> None:
        # SigLIP's so400m has 384 pixels in patches of 14: six at the right and the bottom are never seen.
        if self.image_size < self.patch_dim or (self.image_size % self.patch_dim and self.model_subtype == "clip"):
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
    def has_class_token(self) -> bool:
        return self.model_subtype == "clip"

    @property
    def num_positions(self) -> int:
        """Rows of the position embeddings."""
        return self.num_patches + self.has_class_token

    @property
    def num_image_embeddings(self) -> int:
        """Embeddings that one image puts into the language model's sequence."""
        return self.num_patches + (self.has_class_token and not self.drop_class_token)

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
class PictureArch:
    """How a picture becomes the squares that the vision tower sees, and a sequence of their features."""

    mode: Literal["crop", "pad", "squash"] = "crop"
    """What becomes of a picture that is not square: its middle (CLIP), a margin of the mean colour (LLaVA-1.5),
    or other proportions (SigLIP; always, where the whole picture is seen beside its tiles)."""
    tiling: Literal["none", "anyres", "dynamic"] = "none"
    """Whether a picture is cut into several squares: never, as LLaVA-NeXT does, or as InternVL and NVLM."""
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    """anyres: height and width in pixels that the tiles may cover together; earlier ones win ties."""
    max_num_tiles: int = 0
    """dynamic: most tiles of a picture, the whole picture beside them not counted."""
    tile_tags: bool = False
    """dynamic: whether text before each tile tells which it is, as NVLM's <tile_1>."""

    def __post_init__(self) -> None:
        for name, known in (("mode", ("crop", "pad", "squash")), ("tiling", ("none", "anyres", "dynamic"))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"image {name} {value!r} is none of {', '.join(known)}")
        if self.tiling != "none" and self.mode != "squash":
            raise ValueError(
                f"image mode {self.mode!r} with tiling {self.tiling!r}: the whole picture beside its tiles is always "
                "squashed, give no other mode"
            )
        is_fitting = {
            "none": not self.grid_pinpoints and not self.max_num_tiles and not self.tile_tags,
            "anyres": bool(self.grid_pinpoints) and not self.max_num_tiles and not self.tile_tags,
            "dynamic": not self.grid_pinpoints and self.max_num_tiles > 0,
        }
        if not is_fitting[self.tiling]:
            raise ValueError(
                f"tiling {self.tiling!r} with grid pinpoints {self.grid_pinpoints}, max_num_tiles "
                f"{self.max_num_tiles}, tile_tags {self.tile_tags}: anyres takes grid pinpoints and nothing else, "
                "dynamic a positive max_num_tiles and tags, none takes nothing"
            )

    @property
    def has_newline(self) -> bool:
        """Whether a learned embedding ends each row of tiles."""
        return self.tiling == "anyres"


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryScaling:
    """How rotary frequencies are stretched for sequences longer than those of the pretraining."""

    rope_type: Literal["linear", "dynamic", "llama3"]
    """Hugging Face's names: all frequencies alike; NTK by the sequence's length; LLaMA 3.1's by wavelength."""
    factor: float
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: those below original_max_position_embeddings / high_freq_factor are not; between, in part."""
    original_max_position_embeddings: int = 8192
    """llama3: positions of the pretraining."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"the factor of rotary scaling must be at least 1, not {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be above 0 and below high_freq_factor "
                f"{self.high_freq_factor}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageArch:
    """A decoder-only language model as mcore's `GPTModel` builds it: RMSNorm, SwiGLU, RoPE."""

    model_type: Literal["llama", "mistral", "qwen2"] = "mistral"
    """Hugging Face's name of the family, under which the model leaves; the layers do not depend on it."""
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
    rotary_scaling: RotaryScaling | None = None
    sliding_window: int | None = None
    """Tokens that a token sees, itself included; all before it if None."""
    add_qkv_bias: bool = False
    layernorm_epsilon: float = 1e-5
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, or null for none, not {self.sliding_window}")

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
    """Token that stands for one image embedding: no text can make it, for it lies outside the tokenizer
    or is one of its control tokens."""
    pictures: PictureArch = PictureArch()
    conversation: str = "mistral_instruct"
    """Template of mmcore.data.templates that the language model was tuned with."""
    sources: tuple[dict[str, str], ...] = ()
    """Files the weights came from: {"file": name, "sha256": hash}."""

    def __post_init__(self) -> None:
        vision = self.vision
        if vision is None or not self.pictures.has_newline:
            return
        side = vision.image_size
        for pinpoint in self.pictures.grid_pinpoints:
            if len(pinpoint) != 2 or any(length < side or length % side for length in pinpoint):
                raise ValueError(
                    f"the grid pinpoint {'x'.join(map(str, pinpoint))} is not made of whole squares of {side} pixels, "
                    "which are what the vision tower sees"
                )
        if vision.num_image_embeddings != vision.num_patches:
            raise ValueError("anyres needs a vision tower without its class token (drop_class_token)")

    def picture_options(self) -> dict[str, Any]:
        """Arguments of `mmcore.data.pictures.Pictures`, which makes of a picture what this model sees."""
        vision = self.vision
        assert vision is not None and self.image_token_id is not None
        return {
            **asdict(self.pictures),
            "image_token_id": self.image_token_id,
            "image_size": vision.image_size,
            "num_square_embeddings": vision.num_image_embeddings,
            # As LLaVA's expand2square and transformers' LlavaImageProcessor round it.
            "background": tuple(int(255 * mean) for mean in vision.image_mean),
        }


def with_image_mode(architecture: Architecture, mode: Literal["", "crop", "pad", "squash"]) -> Architecture:
    """The same with another mode, which needs no other weights; the same if it is empty.

    Raises:
        ValueError: there is no such mode, or pictures are cut into tiles.
    """
    if not mode:
        return architecture
    return replace(architecture, pictures=replace(architecture.pictures, mode=mode))


def newest(folder: Path) -> Path:
    """A checkpoint: the folder itself, or the newest one of the run that it holds.

    Raises:
        ValueError: it is neither.
    """
    if (folder / MEGATRON_FILE).is_file():
        raise ValueError(
            f"{folder} is in Megatron-LM's own layout, which is for Megatron-LM: convert the weights again without "
            "--format megatron"
        )
    if (folder / MODEL_FILE).is_file():
        return folder
    if found := checkpoints(folder):
        return found[-1]
    raise ValueError(f"{folder} is no checkpoint and holds none: give a folder that combine.py or mmcore train wrote")


def checkpoints(run: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("step_*") if (path / MODEL_FILE).is_file())


def cut_widths(architecture: Architecture) -> dict[str, int]:
    """What tensor ranks share, and so must divide: sizes by name."""
    vision, between, language = architecture.vision, architecture.vision_projection, architecture.language
    widths: dict[str, int] = {}
    if vision is not None:
        widths["attention heads of the vision tower"] = vision.num_attention_heads
        widths["MLP width of the vision tower"] = vision.ffn_hidden_size
    if between is not None and language is not None:
        widths["width of the projector"] = between.ffn_hidden_size or language.hidden_size
    if language is not None:
        widths["attention heads of the language model"] = language.num_attention_heads
        widths["key-value heads of the language model"] = language.num_query_groups
        widths["MLP width of the language model"] = language.ffn_hidden_size
    return widths


def check_layout(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Refuse a layout that the architecture, a whole model or one of its towers, cannot take.

    Raises:
        ValueError: tensor ranks do not divide the heads, key-value heads, MLP widths or the padded
            vocabulary, the language model has not a layer for each stage and chunk, or context ranks cannot share
            its sequences.
    """
    size, language = parallel.tensor_model_parallel_size, architecture.language
    widths = cut_widths(architecture)
    if language is not None:
        widths["padded vocabulary of the language model"] = language.padded_vocab_size
    bad = [f"{name} ({width})" for name, width in widths.items() if width % size]
    if bad:
        raise ValueError(
            f"--parallel.tensor-model-parallel-size {size} does not divide the {', the '.join(bad)}: "
            "choose a size that divides them all"
        )
    if parallel.context_parallel_size > 1 and language is not None:
        scaling = language.rotary_scaling
        is_dynamic = scaling is not None and scaling.rope_type == "dynamic"
        if is_dynamic or language.sliding_window is not None:
            what = "dynamic rotary embeddings" if is_dynamic else f"a sliding window of {language.sliding_window}"
            raise ValueError(
                f"--parallel.context-parallel-size {parallel.context_parallel_size} with a language model that has "
                f"{what}: its sequences cannot be shared. Leave it out"
            )
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    given = {
        "first": parallel.num_layers_in_first_pipeline_stage,
        "last": parallel.num_layers_in_last_pipeline_stage,
    }
    if language is not None and language.num_layers < stages * chunks:
        times = f" x --parallel.virtual-pipeline-model-parallel-size {chunks}" if chunks > 1 else ""
        raise ValueError(
            f"--parallel.pipeline-model-parallel-size {stages}{times} is more than the {language.num_layers} layers of "
            f"the language model: each {'chunk' if chunks > 1 else 'stage'} needs one"
        )
    given = {place: layers for place, layers in given.items() if layers}
    if language is not None and given:
        left, others = language.num_layers - sum(given.values()), stages - len(given)
        if left < others * chunks or (left and not others):
            options = " and ".join(
                f"--parallel.num-layers-in-{place}-pipeline-stage {layers}" for place, layers in given.items()
            )
            raise ValueError(
                f"{options} leaves {left} of the {language.num_layers} layers of the language model to {others} other "
                f"stages: each needs {chunks}" + ("" if others else ", and there are none")
            )


def check_length(architecture: Architecture, seq_length: int) -> None:
    """Refuse sequences that are longer than the language model knows positions, unless it stretches with them.

    Raises:
        ValueError: names both lengths.
    """
    language = architecture.language
    assert language is not None
    scaling, most = language.rotary_scaling, language.max_position_embeddings
    if seq_length > most and (scaling is None or scaling.rope_type != "dynamic"):
        raise ValueError(
            f"--data.seq-length {seq_length} is beyond the {most} positions that the language model was made for "
            f"(max_position_embeddings): give at most {most}. More tokens at a time are --train.micro-batch-size"
        )


def save_architecture(architecture: Architecture, folder: Path) -> None:
    """Write `folder/model.json`."""
    content = {"format": FORMAT, **asdict(architecture)}
    (folder / MODEL_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_architecture(folder: Path) -> Architecture:
    """Read `folder/model.json`.

    Raises:
        ValueError: the folder or file is missing, is not JSON, holds a key that this version does not know, or
            describes a larger model than the checkpoint's files hold.
    """
    path = folder / MODEL_FILE
    try:
        content = parse_json(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: --checkpoint takes a folder that a converter, combine.py or mmcore train wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} is not a model description of this version (format {FORMAT}; its format is {found}): convert the "
            "weights again"
        )
    parts = {
        "vision": VisionArch,
        "vision_projection": ProjectorArch,
        "language": LanguageArch,
        "pictures": PictureArch,
    }
    try:
        for name, kind in parts.items():
            if content.get(name) is not None:
                content[name] = kind(**{key: _value(key, value) for key, value in content[name].items()})
        architecture = Architecture(**{key: _value(key, value) for key, value in content.items()})
        _check_stored(architecture, folder)
        return architecture
    except (AttributeError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} does not describe a model of this version ({error})") from None


def _check_stored(architecture: Architecture, folder: Path) -> None:
    """A model is built before its weights are read: one number of a stranger's file must not take all the memory."""
    from mmcore.models.parameters import num_parameters

    stored = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    count = sum(num_parameters(architecture).values())
    if (folder / ".metadata").is_file() and count > stored:
        raise ValueError(
            f"{folder / MODEL_FILE} describes a model of {count} parameters, for which the {stored} bytes of the "
            "checkpoint's files are too few: copy it again, or take another"
        )


def _value(key: str, value: Any) -> Any:
    """JSON has neither tuples nor our types."""
    if key == "rotary_scaling" and value is not None:
        return RotaryScaling(**value)
    return tuple(_value("", item) for item in value) if isinstance(value, list) else value
