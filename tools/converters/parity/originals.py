"""The originals: each kind of folder or file that a converter takes, as its own library builds and runs it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parity import fused_llama, joined_llava, meta_llama
from torch import Tensor, nn
from weight_files import open_file, open_folder, read_json

from mmcore.models.architecture import Architecture, VisionArch

Layers = Sequence[nn.Module] | nn.ModuleList


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """A model of another library: what to run and where to look."""

    name: str
    tower: nn.Module | None = None
    """Takes images [n, 3, h, w]."""
    tower_layers: Layers = ()
    projector: nn.Module | None = None
    language: nn.Module | None = None
    """The language model with its head."""
    language_layers: Layers = ()
    norm: nn.Module | None = None
    """The norm after the last layer."""
    read: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    """Tokens int64 [b, s], bool [b, s] where an image embedding goes, images or None -> logits [b, s, v]."""
    unproven: str = ""
    """What it was told by the checkpoint, and so proves nothing about."""


# Classes of transformers by the model_type of config.json.
DECODERS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TOWERS = {name: kind for kind in ("CLIP", "Siglip") for name in (kind.lower(), f"{kind.lower()}_vision_model")}


def open_original(paths: Sequence[Path], architecture: Architecture) -> Original:
    """Build the original model, in fp32.

    Args:
        paths: as reference.py takes them.
        architecture: of the checkpoint, for sizes that a mere file of weights does not tell.
    Raises:
        ValueError: it is of no kind that is known, incomplete, or a path is missing or too many.
    """
    path, *others = paths
    is_folder = (path / "config.json").is_file()
    config = read_json(path / "config.json") if is_folder else {}
    kind = config.get("model_type")
    if "mm_vision_tower" in config and kind not in fused_llama.MODEL_TYPES:
        if len(others) != 1:
            raise ValueError(
                f"{path} is an original LLaVA's folder, which has no vision tower: give two paths, this folder and "
                f"the tower ({config['mm_vision_tower']})"
            )
        return _joined_llava(path, config, others[0], architecture)
    if others:
        raise ValueError(f"{path} is a whole original: leave out {', '.join(map(str, others))}")
    if kind in DECODERS:
        return _decoder(_pretrained(DECODERS[kind], path), f"transformers' {DECODERS[kind]}")
    if kind in TOWERS:
        return _tower(path, TOWERS[kind])
    if kind == "llava":
        return _llava(path)
    if kind == "llava_next":
        return _llava_next(path)
    if kind in fused_llama.MODEL_TYPES:
        return _fused_llama(path, config)
    if kind is not None:  # timm's folders of open_clip's models have a config.json without one
        known = ", ".join([*DECODERS, *TOWERS, "llava", *fused_llama.MODEL_TYPES])
        raise ValueError(f"{path}: model_type is {kind!r}; the originals that can be run are {known}")
    if (path / "params.json").is_file():
        return _meta_llama(path, architecture)
    if path.is_file() or (path / "open_clip_config.json").is_file():
        return _open_clip(path, architecture)
    raise ValueError(
        f"{path} is no original that can be run: expected a folder with config.json, params.json or "
        "open_clip_config.json, or a file of CLIP's weights"
    )


def _pretrained(name: str, folder: Path, **options: Any) -> Any:
    """A model of transformers.

    Raises:
        ValueError: a tensor is missing, which transformers would make up.
    """
    import transformers

    model, report = getattr(transformers, name).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(f"{folder} is incomplete for transformers' {name}: it lacks {', '.join(missing)}")
    return model.eval()


def _decoder(model: Any, name: str) -> Original:
    return Original(
        name=name,
        language=model,
        language_layers=model.model.layers,
        norm=model.model.norm,
        read=lambda tokens, *_: model(input_ids=tokens, use_cache=False).logits,
    )


def _tower(folder: Path, kind: str) -> Original:
    import transformers

    name = f"{kind}VisionModel"
    config = getattr(transformers, f"{kind}VisionConfig").from_pretrained(folder)
    config.vision_use_head = False  # SigLIP's: ours has none, and leaves without
    model = _pretrained(name, folder, config=config)
    return Original(name=f"transformers' {name}", tower=model, tower_layers=model.encoder.layers)


def _llava(folder: Path) -> Original:
    name = "LlavaForConditionalGeneration"
    model = _pretrained(name, folder)

    def read(tokens: Tensor, is_image: Tensor, images: Tensor | None) -> Tensor:
        # Whatever id the image token has, it is replaced: one that the text lacks will do.
        used = set(tokens.flatten().tolist())
        model.config.image_token_id = next(token for token in range(len(used) + 1) if token not in used)
        tokens = tokens.masked_fill(is_image, model.config.image_token_id)
        return model(input_ids=tokens, pixel_values=images, use_cache=False).logits

    return _whole(name, model, read)


def _llava_next(folder: Path) -> Original:
    """Given squares whose features stand in the sequence one after the other, without what ends their rows."""
    name = "LlavaNextForConditionalGeneration"
    model = _pretrained(name, folder)
    config, whole = model.config, model.model

    def read(tokens: Tensor, is_image: Tensor, images: Tensor | None) -> Tensor:
        embeddings = model.get_input_embeddings()(tokens.masked_fill(is_image, 0))  # [b, s, h]
        if images is not None:
            hidden = whole.vision_tower(images, output_hidden_states=True).hidden_states[config.vision_feature_layer]
            chosen = hidden[:, int(config.vision_feature_select_strategy == "default") :]
            embeddings[is_image] = whole.multi_modal_projector(chosen).flatten(0, 1)
        return model(inputs_embeds=embeddings, use_cache=False).logits

    return _whole(name, model, read)


def _whole(name: str, model: Any, read: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Original:
    vision, language = model.model.vision_tower, model.model.language_model
    return Original(
        name=f"transformers' {name}",
        tower=vision,
        tower_layers=vision.encoder.layers,
        projector=model.model.multi_modal_projector,
        language=nn.ModuleList([language, model.lm_head]),
        language_layers=language.layers,
        norm=language.norm,
        read=read,
    )


def _fill(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Give every parameter its value, one at a time."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(read(name))


def _fused_llama(folder: Path, config: dict[str, Any]) -> Original:
    model, weights = fused_llama.build(config), open_folder(folder)
    _fill(model, lambda name: fused_llama.read(name, weights, model.config))
    return _decoder(model, "transformers' LlamaForCausalLM, with q, k and v out of wqkv")


def _meta_llama(folder: Path, architecture: Architecture) -> Original:
    from consolidated import open_consolidated

    if architecture.language is None:
        raise ValueError(f"{folder} is a language model, and the checkpoint has none")
    weights = open_consolidated(folder)
    shapes = {name: header.shape for name, header in weights.headers.items()}
    sizes = meta_llama.read_sizes(read_json(folder / "params.json"), shapes, architecture.language)
    with torch.device("meta"):
        model = meta_llama.MetaLlama(sizes)
    model.to_empty(device="cpu")
    _fill(model, weights.read)
    return Original(
        name="LLaMA in plain torch",
        language=model,
        language_layers=model.layers,
        norm=model.norm,
        read=lambda tokens, *_: model(tokens),
    )


def _open_clip(path: Path, architecture: Architecture) -> Original:
    """OpenAI's CLIP or one of open_clip's: in open_clip they are the same."""
    from open_clip.model import _build_vision_tower

    if path.is_dir():
        config = read_json(path / "open_clip_config.json")["model_cfg"]
        sizes, quick_gelu, unproven = config["vision_cfg"], bool(config.get("quick_gelu")), ""
        files = sorted(file for file in path.glob("open_clip_*") if file.suffix in (".safetensors", ".bin"))
        if not files:
            raise ValueError(f"{path} holds open_clip_config.json but no weights of open_clip")
        weights = open_file(files[-1])
    else:
        vision = architecture.vision
        if vision is None:
            raise ValueError(f"{path} is a vision tower, and the checkpoint has none")
        weights, sizes = open_file(path), _sizes(vision)
        # OpenAI's archives are known by the sizes that they hold, and all have this activation.
        quick_gelu = "input_resolution" in weights.headers or vision.activation == "quick_gelu"
        unproven = "heads and activation are not proven: the original's file does not tell them"
    width = weights.headers["visual.proj"].shape[1] if "visual.proj" in weights.headers else 1
    model = _build_vision_tower(width, sizes, quick_gelu)
    names = {name.removeprefix("visual."): name for name in weights.headers if name.startswith("visual.")}
    if differing := names.keys() ^ (model.state_dict().keys() - ({"proj"} - names.keys())):
        raise ValueError(f"{path} does not fit open_clip's VisionTransformer: {', '.join(sorted(differing))}")
    model.load_state_dict({short: weights.read(name) for short, name in names.items()}, strict=False)
    return Original(
        name="open_clip's VisionTransformer",
        tower=model.eval(),
        tower_layers=model.transformer.resblocks,
        unproven=unproven,
    )


def _sizes(vision: VisionArch) -> dict[str, Any]:
    """open_clip's vision_cfg."""
    return {
        "image_size": vision.image_size,
        "layers": vision.num_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "mlp_ratio": (vision.ffn_hidden_size + 0.5) / vision.hidden_size,  # the product is cut to an integer
        "patch_size": vision.patch_dim,
    }


def _joined_llava(folder: Path, config: dict[str, Any], tower: Path, architecture: Architecture) -> Original:
    import transformers

    kind = str(config["model_type"]).replace("llava_", "").replace("llava", "llama")
    if kind not in DECODERS:
        raise ValueError(f"{folder}: model_type is {config['model_type']!r}, whose language model is not known here")
    own = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    settings = getattr(transformers, DECODERS[kind].replace("ForCausalLM", "Config"))(**own)
    language = _pretrained(DECODERS[kind], folder, config=settings)
    weights, vision = open_folder(folder), open_original([tower], architecture)
    assert vision.tower is not None
    if read := joined_llava.tuned_tower(weights):
        if not hasattr(vision.tower, "config"):
            raise ValueError(f"{folder} holds a vision tower of transformers: give the folder of one, not {tower}")
        _fill(vision.tower, read)
    if not any(joined_llava.PROJECTOR in name for name in weights.headers):
        weights = open_file(folder / "mm_projector.bin")
    projector = joined_llava.read_projector(weights)
    has_class_token = any(name.endswith("class_embedding") for name, _ in vision.tower.named_parameters())
    model = joined_llava.JoinedLlava(vision.tower, vision.tower_layers, projector, language, config, has_class_token)
    return Original(
        name=f"LLaVA of {vision.name} and transformers' {DECODERS[kind]}",
        tower=vision.tower,
        tower_layers=vision.tower_layers,
        projector=projector,
        language=language,
        language_layers=language.model.layers,
        norm=language.model.norm,
        read=model,
        unproven=vision.unproven,
    )
