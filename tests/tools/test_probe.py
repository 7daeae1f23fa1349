"""probe.py and the layouts: what ours and the original are given, and where ours runs."""

from dataclasses import replace

import torch
import verify
from parity import probe

from mmcore.models.architecture import (
    Architecture,
    LanguageArch,
    ProjectorArch,
    RotaryScaling,
    VisionArch,
)

LANGUAGE = LanguageArch(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=12,
    max_position_embeddings=32,
)
VISION = VisionArch(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, image_size=32, patch_dim=8)


def test_layouts_that_an_architecture_does_not_allow() -> None:
    allowed, left_out = verify.split_layouts(Architecture(language=LANGUAGE))
    assert [verify.layout_name(layout) for layout in allowed] == [
        "tensor parallel size 1, pipeline parallel size 1",
        "tensor parallel size 2, pipeline parallel size 1",
        "tensor parallel size 1, pipeline parallel size 2",
        "tensor parallel size 2, pipeline parallel size 2",
    ]
    assert [line.split(" left out: ")[0] for line in left_out] == ["tensor parallel size 4, pipeline parallel size 1"]
    assert "key-value heads of the language model (2)" in left_out[0]
    assert verify.split_layouts(Architecture(vision=VISION)) == (list(verify.LAYOUTS), [])


def test_the_probe() -> None:
    """Text before, between and after two images; no image token in it, though that is one of the vocabulary's."""
    whole = Architecture(
        vision=VISION, vision_projection=ProjectorArch(ffn_hidden_size=64), language=LANGUAGE, image_token_id=5
    )
    cases = probe.build_probe(whole)
    assert list(cases) == ["pixels", "text", "text around two images"]
    assert cases["pixels"]["images"].shape == (2, 3, 32, 32)
    assert cases["text"]["tokens"].shape == (2, 32) and not cases["text"]["is_image"].any()
    mixed = cases["text around two images"]
    assert torch.equal(mixed["images"], cases["pixels"]["images"])
    runs, lengths = mixed["is_image"][0].unique_consecutive(return_counts=True)
    assert runs.tolist() == [False, True, False, True, False] and lengths[1] == lengths[3] == 16
    assert set(cases["text"]["tokens"].flatten().tolist()) == set(range(12)) - {5}
    assert 5 not in mixed["tokens"]
    outside = probe.build_probe(replace(whole, image_token_id=12))["text"]["tokens"]
    assert set(outside.flatten().tolist()) == set(range(12))


def test_the_probe_goes_beyond_what_is_near() -> None:
    stretched = replace(LANGUAGE, rotary_scaling=RotaryScaling(rope_type="dynamic", factor=2.0))
    near, far = replace(LANGUAGE, sliding_window=100), replace(LANGUAGE, sliding_window=4096)
    lengths = {"text": 32, "long text": 32 + 24}
    for arch, wanted, beyond in (
        (LANGUAGE, {"text": 32}, []),
        (stretched, lengths, []),
        (near, {"text": 32, "long text": 124}, []),
        (far, {"text": 32}, ["no probe reaches beyond the window of 4096 tokens"]),
        (replace(stretched, sliding_window=4096), lengths, ["no probe reaches beyond the window of 4096 tokens"]),
    ):
        architecture = Architecture(language=arch)
        cases = probe.build_probe(architecture)
        assert {name: case["tokens"].shape[1] for name, case in cases.items()} == wanted
        assert probe.unreached(architecture) == beyond
