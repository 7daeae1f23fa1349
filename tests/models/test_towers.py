"""The whole model against the libraries that made its parts, joined by hand, at every layout.

From the originals' files through the converters, the checkpoint and the sharded model to features and
logits. tools/converters/verify.py looks at every layer; this looks at the model as training calls it,
and shares no code with it. Tolerance: 1e-5 of the largest value. Measured: sums in another order give
1e-6.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from mmcore import checkpoint
from mmcore.config import ParallelConfig
from mmcore.models.architecture import load_architecture
from mmcore.models.llava import LlavaModel, base_config
from tests import ranks

ROOT = Path(__file__).parents[2]
HEADS, VOCABULARY, WIDTH, PATCHES = 8, 150, 64, 16
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]


class Inputs(NamedTuple):
    """Two samples: text before, between and after two images, and text alone."""

    tokens: Tensor
    """int64 [2, s], the image token where an image embedding goes."""
    images: Tensor
    """float32 [2, 3, 32, 32]."""


class Towers(NamedTuple):
    folder: Path
    """Holds a checkpoint by the name of each projector."""
    clip: Any
    mistral: Any
    projectors: dict[str, dict[str, Tensor]]


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
def towers(tmp_path_factory: Any) -> Towers:
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    vision = {"layers": 4, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    clip = noisy(open_clip.model.CLIP(16, vision, text, quick_gelu=True))
    torch.save(clip.state_dict(), folder / "clip.pt")
    mistral = noisy(
        MistralForCausalLM(
            MistralConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=96,
                num_hidden_layers=4,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS // 2,
                head_dim=16,
                sliding_window=None,
                rope_theta=1e6,
                max_position_embeddings=128,
            )
        )
    )
    mistral.save_pretrained(folder / "mistral")
    square, row = (WIDTH, WIDTH), (WIDTH,)
    shapes = {
        "mlp2x_gelu": {"0.weight": square, "0.bias": row, "2.weight": square, "2.bias": row},
        "linear": {"weight": square, "bias": row},
    }
    clip_options = ("--num-attention-heads", HEADS, "--activation", "quick_gelu")
    convert("clip", "--input", folder / "clip.pt", "--output", folder / "vision", *clip_options)
    convert("mistral", "--input", folder / "mistral", "--output", folder / "language")
    parts = ("--vision", folder / "vision", "--language", folder / "language")
    projectors = {}
    for kind, tensors in shapes.items():
        projectors[kind] = {name: 0.2 * torch.randn(shape) for name, shape in tensors.items()}
        state = {f"model.mm_projector.{name}": tensor for name, tensor in projectors[kind].items()}
        torch.save(state, folder / f"{kind}.bin")
        convert("combine", *parts, "--projector-weights", folder / f"{kind}.bin", "--output", folder / kind)
    return Towers(folder, clip, mistral, projectors)


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (2, 48), generator=generator)
    tokens[0, 7 : 7 + PATCHES] = VOCABULARY
    tokens[0, 30 : 30 + PATCHES] = VOCABULARY
    return Inputs(tokens, torch.randn(2, 3, 32, 32, generator=generator))


def projected(features: Tensor, weights: dict[str, Tensor]) -> Tensor:
    if "weight" in weights:
        return features @ weights["weight"].T + weights["bias"]
    inside = F.gelu(features @ weights["0.weight"].T + weights["0.bias"])
    return inside @ weights["2.weight"].T + weights["2.bias"]


def joined(towers: Towers, projector: str, given: Inputs) -> tuple[Tensor, Tensor]:
    """Features [2, 16, h] and logits [2 * s, v], by the originals."""
    hidden = []
    blocks = towers.clip.visual.transformer.resblocks
    hooks = [block.register_forward_hook(lambda *args: hidden.append(args[2])) for block in blocks]
    towers.clip.visual(given.images)
    for hook in hooks:
        hook.remove()
    features = hidden[-2][:, 1:]  # the second-to-last layer's, without the class token
    is_image = given.tokens == VOCABULARY
    embeddings = towers.mistral.get_input_embeddings()(given.tokens.masked_fill(is_image, 0))
    embeddings[is_image] = projected(features, towers.projectors[projector]).flatten(0, 1)
    return features, towers.mistral(inputs_embeds=embeddings).logits.flatten(0, 1)


def outputs(layout: ParallelConfig, folder: Path, given: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Vision features and logits, each from the stage that has them."""
    model = LlavaModel(load_architecture(folder), "local", **base_config(layout)).eval()
    checkpoint.load_checkpoint(folder, model)
    features = model.vision_model(given.images) if model.pre_process else None
    if not model.pre_process:
        hidden = torch.empty(*given.tokens.T.shape, WIDTH)  # [s, b, h]
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor([hidden])
    output = model(given.tokens, given.images)
    if not model.post_process:
        torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        output = None
    return features, output


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@torch.no_grad()
def test_the_whole_equals_its_originals(tensor: int, pipeline: int, projector: str, towers: Towers) -> None:
    given = inputs()
    expected_features, expected_logits = joined(towers, projector, given)
    layout = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    results = ranks.run(outputs, layout, tensor * pipeline, layout, towers.folder / projector, given)
    features = [result[0] for result in results if result[0] is not None]
    logits = [result[1] for result in results if result[1] is not None]
    assert len(features) == len(logits) == tensor
    for found in features:
        assert_close(found, expected_features)
    for found in logits:
        assert_close(found, expected_logits)
