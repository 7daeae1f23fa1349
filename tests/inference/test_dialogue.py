"""A conversation as the model takes it, and its answer as people read it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmcore.data.templates import Turn
from mmcore.data.tokenizer import Tokenizer, load_tokenizer
from mmcore.evaluation.task import Example
from mmcore.inference.answers import layout
from mmcore.inference.dialogue import Stripped, TooLongError, lay_out
from mmcore.models.architecture import Architecture, PictureArch
from tests import tiny
from tests.answering import SPECIAL
from tests.data.fabricated import picture
from tests.data.vocabularies import spaced

FILES = [picture(0, (60, 21)), picture(1)]
QUESTION = Turn("user", "<image>\n<image>\nWhat?")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(spaced(tmp_path_factory.mktemp("tokenizer"), SPECIAL))


def architecture(**pictures: Any) -> Architecture:
    base = replace(tiny.architecture(), conversation="vicuna_v1", image_token_id=1 << 20)
    return replace(base, pictures=PictureArch(**pictures))


@pytest.mark.parametrize(
    "options", [{}, {"mode": "squash", "tiling": "anyres", "grid_pinpoints": ((16, 32), (32, 16))}]
)
def test_a_question_is_laid_out_as_a_tasks(tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    """Tokens, pixels and their sources."""
    model = architecture(**options)
    prompt = lay_out([QUESTION], FILES, tokenizer, model, 1000)
    expected = layout(Example(id="a", prompt="What?", images=tuple(FILES)), tokenizer, model)
    assert prompt.tokens == expected.tokens and torch.equal(prompt.images, expected.images)
    assert (prompt.image_sources is None) == (expected.image_sources is None) == (not options)
    if prompt.image_sources is not None and expected.image_sources is not None:
        assert torch.equal(prompt.image_sources, expected.image_sources)


def test_nothing_is_decoded_that_does_not_fit(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    length = len(lay_out([QUESTION], FILES, tokenizer, architecture(), 1000).tokens)
    assert len(lay_out([QUESTION], FILES, tokenizer, architecture(), length + 1).tokens) == length
    monkeypatch.setattr("mmcore.data.pictures.Pictures.encode", None)
    with pytest.raises(TooLongError, match=f"has {length} tokens, pictures included; {length - 1} leave room"):
        lay_out([QUESTION], FILES, tokenizer, architecture(), length)


def test_a_picture_that_is_none_is_told_by_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="picture 2: not a picture"):
        lay_out([QUESTION], [FILES[0], b"no picture"], tokenizer, architecture(), 1000)
    with pytest.raises(ValueError, match="2 <image> for 1 pictures"):
        lay_out([QUESTION], FILES[:1], tokenizer, architecture(), 1000)


@pytest.mark.parametrize("text", ["", " \n ", "A cat.", " \n A  cat \n\n on a mat. \n", "a b c d", "  x"])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_together_are_the_stripped_text(text: str, size: int) -> None:
    stripped = Stripped()
    pieces = [stripped(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(pieces) == text.strip()
    assert all(piece == piece.rstrip() for piece in pieces)
