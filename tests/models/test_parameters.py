"""Parameters counted from the architecture are those of the model that is built from it."""

from dataclasses import replace

import pytest

from mmcore.config import ParallelConfig
from mmcore.models.architecture import Architecture, PictureArch
from mmcore.models.parameters import num_parameters
from tests import ranks, tiny

PLAIN = tiny.architecture()
assert PLAIN.vision is not None and PLAIN.language is not None
ARCHITECTURES = {
    "clip": PLAIN,
    "no bias": tiny.architecture(add_bias_linear=False),
    "affine": tiny.architecture(projector_type="affine", ffn_hidden_size=0),
    "siglip": replace(PLAIN, vision=replace(PLAIN.vision, model_subtype="siglip")),
    "newline": replace(PLAIN, pictures=PictureArch(mode="squash", tiling="anyres", grid_pinpoints=((16, 32),))),
    "tied": replace(PLAIN, language=replace(PLAIN.language, share_embeddings_and_output_weights=True)),
    "qkv bias": replace(PLAIN, language=replace(PLAIN.language, add_qkv_bias=True)),
}


def built(architectures: list[Architecture]) -> list[dict[str, int]]:
    found = []
    for architecture in architectures:
        model = tiny.build(ParallelConfig(), arch=architecture)
        found.append({name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()})
    return found


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    (found,) = ranks.run(lambda: built(list(ARCHITECTURES.values())), ParallelConfig(), 1)
    return dict(zip(ARCHITECTURES, found, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts(name: str, counts: dict[str, dict[str, int]]) -> None:
    assert num_parameters(ARCHITECTURES[name]) == counts[name]
