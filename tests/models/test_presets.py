"""Full-size presets have the published numbers of parameters; files say what is wrong with them."""

from pathlib import Path

import pytest
import torch

from mmcore.config import ModelConfig, ParallelConfig
from mmcore.models.architecture import check_layout, load_architecture, save_architecture
from mmcore.models.llava import LlavaModel, base_config
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION, compose, resolve_architecture
from tests import ranks, tiny


def count() -> dict[str, int]:
    language = LANGUAGE["mistral_7b_v03"]
    arch = compose(VISION["clip_vit_l_14_336"], language, PROJECTOR["megatron_mlp"](language))
    with torch.device("meta"):
        model = LlavaModel(arch, "local", **base_config(ParallelConfig()))
    return {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}


def test_published_parameter_counts() -> None:
    """Mistral-7B-v0.3: 7,248,023,552 (the safetensors index of its model card).

    CLIP ViT-L/14@336: 304,293,888 in OpenAI's visual tower, less what LLaVA drops on purpose: the
    projection into the contrastive space (1024 x 768).
    """
    counted = ranks.run(count, ParallelConfig(), 1)[0]
    assert counted["language_model"] == 7_248_023_552
    assert counted["vision_model"] == 304_293_888 - 1024 * 768
    assert counted["vision_projection"] == 1024 * 14336 + 14336 * 4096


def test_architecture_survives_its_file(tmp_path: Path) -> None:
    arch = tiny.architecture()
    save_architecture(arch, tmp_path)
    assert load_architecture(tmp_path) == arch


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a model description of this version"),
        ('{"format": 1}', "its format is 1.: convert the weights again"),
        ('{"format": 2, "vision": {"layers": 3}}', "unexpected keyword argument 'layers'"),
        ('{"format": 2, "colour": "red"}', "unexpected keyword argument 'colour'"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_architecture(tmp_path)


def test_contradiction_names_both_values(tmp_path: Path) -> None:
    save_architecture(tiny.architecture(), tmp_path)
    with pytest.raises(ValueError, match=r"num_layers: 4 in the checkpoint, 32 in the preset"):
        resolve_architecture(ModelConfig(checkpoint=str(tmp_path), language="mistral_7b_v03"))
    with pytest.raises(ValueError, match=r"'mistral_7b' is not a preset, did you mean 'mistral_7b_v03'"):
        resolve_architecture(ModelConfig(checkpoint=str(tmp_path), language="mistral_7b"))


def test_layouts_that_do_not_fit() -> None:
    arch = tiny.architecture()
    with pytest.raises(ValueError, match=r"4 does not divide the key-value heads of the language model \(2\)"):
        check_layout(arch, ParallelConfig(tensor_model_parallel_size=4))
    with pytest.raises(ValueError, match=r"3 does not divide the 4 layers"):
        check_layout(arch, ParallelConfig(pipeline_model_parallel_size=3))
    with pytest.raises(ValueError, match=r"3 ranks cannot be dealt to replicas of 2"):
        ParallelConfig(tensor_model_parallel_size=2).data_parallel_size(3)
