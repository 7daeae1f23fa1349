"""Layers dealt to pipeline stages: the slowest stage is as fast as any deal makes it."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state

from mmcore.config import ParallelConfig
from mmcore.models.architecture import ProjectorArch
from mmcore.models.pipeline import plan_layers, split_layers, step_costs
from mmcore.models.presets import LANGUAGE, VISION, compose
from tests import ranks, tiny


def slowest(layers: Sequence[int], extra: Sequence[float], layer: float) -> float:
    return max(other + layer * number for number, other in zip(layers, extra, strict=True))


@pytest.mark.parametrize("extra", [(0, 0, 0), (5, 0, 2), (0.5, 0, 7), (100, 0, 0), (3, 1, 4, 1)])
@pytest.mark.parametrize("num_layers", [4, 7, 10])
@pytest.mark.parametrize("layer", [1.0, 2.5])
def test_no_deal_is_faster(num_layers: int, extra: tuple[float, ...], layer: float) -> None:
    deals = itertools.product(range(1, num_layers + 1), repeat=len(extra))
    best = min(slowest(deal, extra, layer) for deal in deals if sum(deal) == num_layers)
    found = split_layers(num_layers, extra, layer)
    assert sum(found) == num_layers and min(found) >= 1
    assert slowest(found, extra, layer) == best


def test_equal_stages_share_evenly_and_the_rest_goes_to_the_last() -> None:
    assert split_layers(8, [0, 0]) == [4, 4]
    assert split_layers(8, [0, 0, 0]) == [2, 3, 3]
    assert split_layers(8, [0]) == [8]


def test_the_user_sets_the_outer_stages() -> None:
    assert split_layers(8, [9, 0, 0], first=4) == [4, 2, 2]
    assert split_layers(8, [9, 0, 0], last=5) == [1, 2, 5]
    assert split_layers(9, [0, 0, 0, 9], first=1, last=3) == [1, 2, 3, 3]
    assert split_layers(8, [0, 0], first=6, last=2) == [6, 2]


def test_costs_are_those_of_the_weights() -> None:
    """Of layers alone, forward: their matrices, once for each position."""
    costs = step_costs(tiny.architecture(), ("vision_model", "vision_projection", "language_model"))
    assert costs.layer / 2 == 48 * (2 * 4 * 16 + 2 * 2 * 16) + 3 * 48 * 80  # and what passes a gradient on
    tower = 2 * (4 * 32**2 + 2 * 32 * 64) * 5 / 4  # the layers that run, the class token beside 4 patches
    assert costs.vision == tower + 40 * (32 + 48)
    assert costs.output == 2 * 48 * 256 * 0.25


def test_a_vision_tower_takes_layers_from_the_first_stage() -> None:
    """CLIP ViT-L/14 of 0.3 billion weights beside Mistral's 32 layers of 0.22; frozen it runs forward alone."""
    arch = compose(VISION["clip_vit_l_14_336"], LANGUAGE["mistral_7b_v03"], ProjectorArch(ffn_hidden_size=14336))
    layout = ParallelConfig(pipeline_model_parallel_size=4)
    assert plan_layers(arch, layout) == [7, 8, 9, 8]
    assert plan_layers(arch, layout, ("vision_model",)) == [8, 8, 8, 8]
    layout = ParallelConfig(pipeline_model_parallel_size=4, num_layers_in_first_pipeline_stage=5)
    assert plan_layers(arch, layout) == [5, 9, 9, 9]
    assert plan_layers(arch, replace(layout, num_layers_in_last_pipeline_stage=6)) == [5, 10, 11, 6]
    interleaved = replace(layout, virtual_pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=6)
    assert plan_layers(arch, interleaved) == [2, 5, 5, 3, 3, 5, 6, 3]


def weights(folder: str, layers: tuple[int, ...], write: bool) -> dict[str, torch.Tensor]:
    """This stage's parameters by their names in the whole model, after the checkpoint is written or read."""
    layout = ParallelConfig(pipeline_model_parallel_size=len(layers))
    model = tiny.build(layout, seed=5 if write else 6, layers=layers)
    state = model.sharded_state_dict()
    if write:
        dist_checkpointing.save(state, folder)
    else:
        model.load_state_dict(dist_checkpointing.load(state, folder), strict=False)
    assert len(model.language_model.decoder.layers) == layers[parallel_state.get_pipeline_model_parallel_rank()]
    return {name: parameter.detach() for name, parameter in tiny.global_parameters(model)}


def test_any_deal_loads_the_checkpoint_of_another(tmp_path: Path) -> None:
    written: dict[str, torch.Tensor] = {}
    for layers, write in [((1, 3), True), ((2, 1, 1), False), ((4,), False)]:
        layout = ParallelConfig(pipeline_model_parallel_size=len(layers))
        found = ranks.run(weights, layout, len(layers), str(tmp_path), layers, write, timeout=30)
        whole = {name: weight for part in found for name, weight in part.items()}
        written = written or whole
        assert whole.keys() == written.keys()
        assert all(torch.equal(whole[name], weight) for name, weight in written.items())
