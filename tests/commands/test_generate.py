"""What the command asks of the model; its answers are tests/inference's, its files the README's."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from mmcore.commands.generate import GenerateConfig, answer
from mmcore.config import ParallelConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.evaluation.task import Example
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
        Example(id="a", prompt="What?", image=tmp_path / "picture.png", references=()),
        Example(id="b", prompt="What?", image=None, references=()),
    ]
    config = GenerateConfig(checkpoint=tmp_path, task="coco", data=tmp_path, output=tmp_path / "out")
    architecture = replace(tiny.architecture(), conversation=conversation, image_token_id=1 << 20)
    assert answer(config, ParallelConfig(), architecture, tmp_path, examples) == ["", ""]
    assert asked["end_id"] == end
    with_picture, without = asked["prompts"]
    assert (len(with_picture.images), len(without.images)) == (1, 0)
    assert tiny.VISION.num_image_embeddings == sum(id == architecture.image_token_id for id in with_picture.tokens)
    assert architecture.image_token_id not in without.tokens
