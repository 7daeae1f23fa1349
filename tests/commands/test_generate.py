"""What the command asks of the model; its answers are tests/inference's, its files the README's."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from mmcore.commands.generate import GenerateConfig, answer
from mmcore.config import ParallelConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.data.tokenizer import load_tokenizer
from mmcore.evaluation.task import Example
from mmcore.inference.answers import layout
from mmcore.models.architecture import PictureArch
from tests import tiny
from tests.data.fabricated import picture
from tests.data.vocabularies import spaced

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(("conversation", "end"), [("vicuna_v1", 2), ("internlm2", 4)])
def test_answers_end_where_the_template_ends_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, conversation: str, end: int
) -> None:
    spaced(tmp_path / TOKENIZER_DIR, SPECIAL)
    (tmp_path / "picture.png").write_bytes(picture(0))
    asked: dict[str, Any] = {}

    def generate(model: Any, prompts: list[Any], **options: Any) -> list[list[int]]:
        asked.update(options, prompts=prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr("mmcore.inference.generator.generate", generate)
    for name in ("models.llava.LlavaModel", "checkpoint.load_checkpoint", "distributed.initialize"):
        monkeypatch.setattr(f"mmcore.{name}", MagicMock())
    monkeypatch.setattr("mmcore.distributed.data_parallel_size", lambda: 1)
    examples = [
        Example(id="a", prompt="What?", images=(tmp_path / "picture.png",)),
        Example(id="b", prompt="What?"),
    ]
    config = GenerateConfig(checkpoint=tmp_path, task="coco", data=tmp_path, output=tmp_path / "out")
    architecture = replace(tiny.architecture(), conversation=conversation, image_token_id=1 << 20)
    assert answer(config, ParallelConfig(), architecture, tmp_path, examples) == ["", ""]
    assert asked["end_id"] == end
    with_picture, without = asked["prompts"]
    assert (len(with_picture.images), len(without.images)) == (1, 0)
    assert tiny.VISION.num_image_embeddings == sum(id == architecture.image_token_id for id in with_picture.tokens)
    assert architecture.image_token_id not in without.tokens


def test_pictures_are_cut_as_in_training(tmp_path: Path) -> None:
    spaced(tmp_path / TOKENIZER_DIR, SPECIAL)
    (tmp_path / "picture.png").write_bytes(picture(0, (60, 21)))
    tokenizer = load_tokenizer(tmp_path / TOKENIZER_DIR)
    example = Example(id="a", prompt="What?", images=(tmp_path / "picture.png",))
    architecture = replace(tiny.architecture(), conversation="vicuna_v1", image_token_id=1 << 20)
    tilings = {
        "anyres": {"grid_pinpoints": ((16, 32), (32, 16))},
        "dynamic": {"max_num_tiles": 6, "tile_tags": True},
    }
    for tiling, options in tilings.items():
        pictures: Any = PictureArch(mode="squash", tiling=tiling, **options)
        prompt = layout(example, tokenizer, replace(architecture, pictures=pictures))
        num_places = prompt.tokens.count(architecture.image_token_id)
        assert len(prompt.images) == {"anyres": 3, "dynamic": 4}[tiling]
        if tiling == "anyres":
            assert prompt.image_sources is not None and len(prompt.image_sources) == num_places
        else:
            assert prompt.image_sources is None and num_places == 4 * tiny.VISION.num_image_embeddings
    (tmp_path / "picture.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"picture\.png of example a: not a picture"):
        layout(example, tokenizer, replace(architecture, pictures=pictures))
