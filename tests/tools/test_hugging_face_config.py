"""An exported configuration says all that the architecture does, to old readers and new."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import decoder
import hugging_face_config
import llama
import llava
import mistral
import pytest
import qwen2
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from mmcore.models.architecture import Architecture, LanguageArch, RotaryScaling, VisionArch
from mmcore.models.presets import LANGUAGE, PROJECTOR, VISION, compose


@pytest.mark.parametrize("language", LANGUAGE.values(), ids=list(LANGUAGE))
def test_language_configurations_say_it_all(language: LanguageArch) -> None:
    older = hugging_face_config.config(Architecture(language=language), "bfloat16", {}, Path("checkpoint"))
    newer = dict(older)
    assert older.pop("rope_parameters") and newer.pop("rope_theta") and newer.pop("rope_scaling", 0) != 0
    family = {"llama": llama.FAMILY, "mistral": mistral.FAMILY, "qwen2": qwen2.FAMILY}[language.model_type]
    for content in (older, newer):
        assert decoder.read_architecture(content, Path("config.json"), family) == language
    kind: Any = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[language.model_type]
    parsed = [kind(**content).rope_parameters for content in (older, newer, older | newer)]
    assert parsed[0] == parsed[1] == parsed[2]


@pytest.mark.parametrize(
    "scaling",
    [
        RotaryScaling(rope_type="linear", factor=2.5),
        RotaryScaling(rope_type="dynamic", factor=2.0),
        RotaryScaling(rope_type="llama3", factor=8.0, low_freq_factor=2.0, original_max_position_embeddings=64),
    ],
)
def test_rotary_scaling_is_kept(scaling: RotaryScaling) -> None:
    test_language_configurations_say_it_all(replace(LANGUAGE["llama2_7b"], rotary_scaling=scaling))


@pytest.mark.parametrize("vision", VISION.values(), ids=list(VISION))
@pytest.mark.parametrize("changes", [{}, {"feature_layer": -1, "drop_class_token": False}])
def test_whole_configurations_say_it_all(vision: VisionArch, changes: dict[str, Any], tmp_path: Path) -> None:
    vision = replace(vision, **changes)
    if not vision.has_class_token:
        vision = replace(vision, drop_class_token=True)  # what an import says of a tower without one
    language = LANGUAGE["mistral_7b_v03"]
    whole = compose(vision, language, PROJECTOR["mlp2x_gelu"](language))
    content = hugging_face_config.config(whole, "bfloat16", {}, tmp_path)
    read = llava.read_architecture(content, tmp_path / "config.json")
    assert read == replace(whole, conversation=read.conversation)
    assert content["image_seq_length"] == vision.num_image_embeddings


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        (replace(LANGUAGE["llama2_7b"], add_qkv_bias=True, sliding_window=9), "sliding_window 9 .*add_qkv_bias True"),
        (replace(LANGUAGE["qwen25_7b_instruct"], add_qkv_bias=False), "add_qkv_bias False"),
        (replace(VISION["clip_vit_b_16"], activation="silu"), "hidden_act is 'silu'"),
    ],
)
def test_what_hugging_face_cannot_say_is_refused(arch: LanguageArch | VisionArch, told: str) -> None:
    part = {"language": arch} if isinstance(arch, LanguageArch) else {"vision": arch}
    with pytest.raises(ValueError, match=told):
        hugging_face_config.config(Architecture(**part), "bfloat16", {}, Path("checkpoint"))
