"""Converted towers against the libraries that made them, logit by logit, at TP 1, TP 2 and PP 2.

From the original's file through the converter, the checkpoint and the sharded model. Tolerance: 1e-5
of the largest value. Measured: logits at TP 1 are equal to the bit, sums in another order give 1e-6.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from megatron.core import parallel_state
from transformers import MistralConfig, MistralForCausalLM

from mmcore import checkpoint
from mmcore.config import ParallelConfig
from mmcore.models.architecture import load_architecture
from mmcore.models.llava import LlavaModel, base_config
from tests import ranks

ROOT = Path(__file__).parents[2]
OPTIONS = ("--num-attention-heads", 4, "--activation", "quick_gelu")
LAYOUTS = {
    "tp1": (ParallelConfig(), 1),
    "tp2": (ParallelConfig(tensor_model_parallel_size=2), 2),
    "pp2": (ParallelConfig(pipeline_model_parallel_size=2), 2),
}


def convert(name: str, *arguments: object) -> None:
    command = [sys.executable, ROOT / "tools" / "converters" / f"{name}.py", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)


def noisy(model: torch.nn.Module) -> Any:
    """Norms and biases off their neutral starts, which would hide a swapped or missing one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def towers(tmp_path_factory: Any) -> tuple[Path, Any, Any]:
    """The combined checkpoint and the two originals."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    vision = {"layers": 4, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    clip = noisy(open_clip.model.CLIP(16, vision, text, quick_gelu=True))
    torch.save(clip.state_dict(), folder / "clip.pt")
    mistral = noisy(
        MistralForCausalLM(
            MistralConfig(
                vocab_size=150,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                sliding_window=None,
                rope_theta=1e6,
                max_position_embeddings=128,
            )
        )
    )
    mistral.save_pretrained(folder / "mistral")
    convert(
        "clip",
        "--input",
        folder / "clip.pt",
        "--output",
        folder / "vision",
        "--num-attention-heads",
        4,
        "--activation",
        "quick_gelu",
    )
    convert("mistral", "--input", folder / "mistral", "--output", folder / "language")
    convert("combine", "--vision", folder / "vision", "--language", folder / "language", "--output", folder / "model")
    return folder / "model", clip, mistral


def outputs(layout: ParallelConfig, folder: Path, tokens: torch.Tensor, images: torch.Tensor) -> tuple[Any, Any]:
    """Vision features and logits, each from the stage that has them."""
    model = LlavaModel(load_architecture(folder), "local", **base_config(layout)).eval()
    checkpoint.load_checkpoint(folder, model)
    features = model.vision_model(images) if model.pre_process else None
    hidden = torch.empty(tokens.shape[1], len(tokens), 64)
    if not model.pre_process:
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor([hidden])
    output = model(tokens)
    if not model.post_process:
        torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        output = None
    return features, output


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_towers_equal_their_originals(name: str, towers: tuple[Path, Any, Any]) -> None:
    folder, clip, mistral = towers
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 150, (2, 40), generator=generator)
    images = torch.randn(3, 3, 32, 32, generator=generator)

    hidden = []
    hooks = [
        block.register_forward_hook(lambda *args: hidden.append(args[2])) for block in clip.visual.transformer.resblocks
    ]
    clip.visual(images)
    for hook in hooks:
        hook.remove()
    expected_features = hidden[-2][:, 1:]  # the second-to-last layer's, without the class token
    expected_logits = mistral(tokens).logits.flatten(0, 1)

    layout, world_size = LAYOUTS[name]
    results = ranks.run(outputs, layout, world_size, layout, folder, tokens, images)
    features = [result[0] for result in results if result[0] is not None]
    logits = [result[1] for result in results if result[1] is not None]
    assert features and logits
    for found in features:
        torch.testing.assert_close(found, expected_features, rtol=0, atol=1e-5 * float(expected_features.abs().max()))
    for found in logits:
        assert found.shape == expected_logits.shape
        torch.testing.assert_close(found, expected_logits, rtol=0, atol=1e-5 * float(expected_logits.abs().max()))
