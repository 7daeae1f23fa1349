"""Text that is told piece by piece is the text of the whole, and nothing that may still change is told."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from mmcore.data.tokenizer import Tokenizer, load_tokenizer
from mmcore.inference.streaming import TextStream

LONG = "The cat sat on the mat. 42 is\n\n3.5 + 38.5"
TEXTS = [LONG, "naïve café 北京 👍🏽 x", " leading", "日本語のテキスト", "a  b", ""]


def sentencepieces(folder: Path) -> Tokenizer:
    """With byte fallback, as LLaMA's."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LONG] * 50),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return load_tokenizer(folder)


def byte_level(folder: Path) -> Tokenizer:
    """As Qwen's and LLaMA 3's."""
    folder.mkdir()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([LONG] * 50, trainer)
    model.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=[sentencepieces, byte_level])
def tokenizer(request: Any, tmp_path_factory: Any) -> Tokenizer:
    build: Callable[[Path], Tokenizer] = request.param
    return build(tmp_path_factory.mktemp("tokenizers") / "one")


def pieces(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """What each token made final, until the answer stopped, and the rest."""
    stream, told = TextStream(tokenizer.decode, stop), []
    for id in ids:
        told.append(stream.push(id))
        if stream.stopped:
            break
    return [*told, stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    told = pieces(tokenizer, ids)
    assert "".join(told) == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in told)
    assert told[-1] == "", "a whole text leaves no rest"


def test_characters_of_several_tokens_are_told_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("北京")
    told = [piece for piece in pieces(tokenizer, ids) if piece]
    assert len(ids) >= 6 and told == ["北", "京"]
    assert "".join(pieces(tokenizer, ids[:-1])).startswith("北\N{REPLACEMENT CHARACTER}")


def test_control_tokens_say_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The cat")
    mixed = [token for id in ids for token in (tokenizer.eos_id, id)]
    assert "".join(pieces(tokenizer, mixed)) == "The cat"


def test_random_texts(tokenizer: Tokenizer) -> None:
    for seed in range(200):
        draw, text = random.Random(seed), "".join(TEXTS)
        ends = [sorted(draw.choices(range(len(text) + 1), k=2)) for _ in range(4)]
        ids = [id for first, last in ends for id in tokenizer.encode(text[first:last])]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


STOPS = ["at", ".", " on the", "\n\n3", "cat sat", "mat. 4"]


@pytest.mark.parametrize("stop", [*([text] for text in STOPS), STOPS[2:], ["xyz", "sat on a"]])
def test_nothing_of_a_stop_text_is_told(tokenizer: Tokenizer, stop: list[str]) -> None:
    whole = tokenizer.decode(tokenizer.encode(LONG))
    cut = min((whole.index(text) for text in stop if text in whole), default=len(whole))
    told = pieces(tokenizer, tokenizer.encode(LONG), stop)
    assert "".join(told) == whole[:cut]


def by_letter(text: str, stop: Sequence[str]) -> list[str]:
    """What each letter makes final."""
    stream = TextStream(lambda ids: "".join(map(chr, ids)), stop)
    return [stream.push(ord(letter)) for letter in text] + [stream.finish()]


def test_the_beginning_of_a_stop_text_waits() -> None:
    assert by_letter("xaab", ["aac"]) == ["x", "", "", "aab", ""]
    assert by_letter("xaa", ["aac"]) == ["x", "", "", "aa"]
    assert by_letter("aaac", ["aac"])[:4] == ["", "", "a", ""]
    assert by_letter("ab", ["abc", "b"]) == ["", "a", ""]
