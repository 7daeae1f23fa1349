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
from transformers import MistralConfig, MistralForCausalLM  # noqa: E402

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
def mistral_folder(tmp_path: Path) -> Path:
    build_mistral().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def clip() -> Callable[..., CLIP]:
    return build_clip
