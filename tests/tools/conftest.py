"""Tiny source models, and a reader of checkpoints that knows nothing of the converters."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

CONVERTERS = Path(__file__).parents[2] / "tools" / "converters"
sys.path.insert(0, str(CONVERTERS))  # where Python puts it when a converter runs as a script

from open_clip.model import CLIP  # noqa: E402
from transformers import LlavaForConditionalGeneration, MistralConfig, MistralForCausalLM  # noqa: E402

State = dict[str, torch.Tensor]


def build_clip(seed: int = 0, **vision: object) -> CLIP:
    """Three layers of four heads, every weight random."""
    torch.manual_seed(seed)
    vision = {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32, "mlp_ratio": 1.5, **vision}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
    return _randomized(CLIP(16, vision, text, quick_gelu=True))


def build_mistral(**changes: object) -> MistralForCausalLM:
    """Four heads in two groups, wider than the hidden size; a vocabulary that needs padding."""
    torch.manual_seed(1)
    config = {
        "vocab_size": 150,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        **changes,
    }
    return _randomized(MistralForCausalLM(MistralConfig(**config)))


def build_language(kind: type, **changes: object) -> torch.nn.Module:
    """A language model of transformers: eight heads in four groups, a vocabulary that needs padding.

    Args:
        kind: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM.
        changes: to its configuration.
    """
    config = {
        "vocab_size": 150,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": None,
        **changes,
    }
    return _moderate(kind(kind.config_class(**config)))


def _vision_config(**changes: object) -> dict[str, object]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}
    return {**sizes, "image_size": 32, "patch_size": 8, **changes}


def build_tower(kind: type, **changes: object) -> torch.nn.Module:
    """A vision model of transformers: eight heads, 16 patches.

    Args:
        kind: CLIPVisionModel, SiglipVisionModel; CLIPModel, SiglipModel with a small text tower.
        changes: to the tower's configuration.
    """
    tower = _vision_config(**changes)
    if not kind.__name__.endswith("VisionModel"):
        sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        text = {**sizes, **ends, "vocab_size": 40, "max_position_embeddings": 8}
        return _moderate(kind(kind.config_class(vision_config=tower, text_config=text)))
    return _moderate(kind(kind.config_class(**tower)))


def build_llava(
    tower: type, language: type, whole: type = LlavaForConditionalGeneration, **changes: object
) -> LlavaForConditionalGeneration:
    """A LLaVA of transformers: a tower of `build_tower`, a vocabulary of 160 with the image token 150 in it.

    Args:
        tower, language: CLIPVisionConfig or SiglipVisionConfig; LlamaConfig, MistralConfig or Qwen2Config.
        whole: LlavaForConditionalGeneration or LlavaNextForConditionalGeneration.
        changes: to its configuration; "text" and "vision" to those of its parts.
    """
    text = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        **changes.pop("text", {}),
    }
    vision = _vision_config(**{"hidden_size": 48, **changes.pop("vision", {})})
    parts = {"vision_config": tower(**vision), "text_config": language(**text)}
    return _moderate(whole(whole.config_class(**parts, image_token_index=150, **changes)))


def _moderate(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases around 1, matrices so that no softmax is all or nothing."""
    random = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        spread, middle = (0.3, 1.0) if parameter.ndim == 1 else (0.2, 0.0)
        parameter.data.normal_(middle, spread, generator=random)
    return model.eval()


def _randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Ones and zeros, which norms and biases start as, would hide mistakes."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


def _read_checkpoint(folder: Path) -> State:
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {key: torch.empty(tensor.size, dtype=tensor.properties.dtype) for key, tensor in metadata.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.fixture
def read_checkpoint() -> Callable[[Path], State]:
    """Every tensor of a distributed checkpoint, read by torch alone."""
    return _read_checkpoint


@pytest.fixture
def clip_state() -> State:
    return {name: tensor.detach() for name, tensor in build_clip().state_dict().items()}


@pytest.fixture
def clip_file(tmp_path: Path, clip_state: State) -> Path:
    torch.save(clip_state, tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


@pytest.fixture
def mistral() -> Callable[..., MistralForCausalLM]:
    return build_mistral


@pytest.fixture
def language() -> Callable[..., torch.nn.Module]:
    return build_language


@pytest.fixture
def tower() -> Callable[..., torch.nn.Module]:
    return build_tower


@pytest.fixture
def llava() -> Callable[..., LlavaForConditionalGeneration]:
    return build_llava


@pytest.fixture
def mistral_folder(tmp_path: Path) -> Path:
    build_mistral().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def clip() -> Callable[..., CLIP]:
    return build_clip
