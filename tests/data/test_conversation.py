import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import InstructRequest
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV2, InstructTokenizerV3
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from mmcore.data.conversation import encode_conversation, encode_document, encode_prompt, read_turns
from mmcore.data.templates import Turn
from mmcore.data.tokenizer import Tokenizer, load_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
V3 = DATA / "mistral_instruct_tokenizer_240323.model.v3"
IMAGE = 32768
PICTURE = [IMAGE] * 3


def sizes(num_images: int) -> dict[str, Any]:
    return {"pictures": [PICTURE] * num_images, "image_token_id": IMAGE}


TALKS = [
    ["What is it?", "A cat."],
    ["Hi", "Hello  ", "  And now?\n", "Nothing.", "Why", "\nBecause\n\n"],
    ["[INST] is not </s> control [/INST]", "</s> neither <s>", "ignore <s>[INST]", "[/INST]"],
    ["Gru\u0308\u00dfe \U0001f408 \u732b\t\x00", "\u2581 \u200b done"],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(V3, folder / "tokenizer.model.v3")
    return load_tokenizer(folder)


VERSIONS: dict[str, tuple[str, Any, str]] = {
    "v1": ("tokenizer.model.v1", InstructTokenizerV1, "mistral_instruct_v1"),
    "v2": ("mistral_instruct_tokenizer_240216.model.v2", InstructTokenizerV2, "mistral_instruct"),
    "v3": (V3.name, InstructTokenizerV3, "mistral_instruct"),
}


@pytest.fixture(scope="module", params=VERSIONS)
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, str]:
    """Our tokenizer of a version, Mistral's, and the template."""
    file, official, template = VERSIONS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(DATA / file, folder / "tokenizer.model")
    return load_tokenizer(folder), official(SentencePieceTokenizer(str(DATA / file))), template


def turns(*texts: str, system: str | None = None) -> list[Turn]:
    talk = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
    return ([] if system is None else [Turn("system", system)]) + talk


def whole(encoded: Any) -> list[int]:
    """The sequence with its last token, which is only a label."""
    return [*encoded.tokens, encoded.labels[-1]]


def trained(encoded: Any) -> list[int]:
    return [label for label, weight in zip(encoded.labels, encoded.loss_mask, strict=True) if weight]


@pytest.mark.parametrize("system", [None, "", "Be [INST] brief."])
@pytest.mark.parametrize("texts", TALKS)
def test_mistral_has_the_official_ids(mistral: Any, texts: list[str], system: str | None) -> None:
    tokenizer, official, template = mistral
    messages = [(AssistantMessage if index % 2 else UserMessage)(content=text) for index, text in enumerate(texts)]
    request: Any = InstructRequest(messages=messages, system_prompt=system)
    encoded = encode_conversation(turns(*texts, system=system), tokenizer, template, **sizes(0))
    assert whole(encoded) == official.encode_instruct(request).tokens


@pytest.mark.parametrize("texts", TALKS)
def test_a_prompt_has_the_official_ids(mistral: Any, texts: list[str]) -> None:
    tokenizer, official, template = mistral
    request: Any = InstructRequest(messages=[UserMessage(content=texts[0])])
    ids = encode_prompt(texts[0], tokenizer, template, **sizes(0))
    assert ids == official.encode_instruct(request).tokens


def test_only_answers_and_their_ends_are_trained(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(turns("Q", "A cat.", "R", "Two."), tokenizer, "mistral_instruct", **sizes(0))
    assert trained(encoded) == [*tokenizer.encode("A cat."), 2, *tokenizer.encode("Two."), 2]
    assert encoded.tokens[1:] == [
        label if weight else token
        for token, label, weight in zip(encoded.tokens[1:], encoded.labels[:-1], encoded.loss_mask[:-1], strict=True)
    ]
    assert all(label == 0 for label, weight in zip(encoded.labels, encoded.loss_mask, strict=True) if not weight)
    assert not encoded.was_cut


@pytest.mark.parametrize(
    ("question", "before", "after"),
    [
        ("<image>\nWhat?", "", "What?"),
        ("What?\n<image>", "What?", ""),
        ("This\n<image>\nis?", "This", "is?"),
        ("<image>\n\nWhat?", "", "\nWhat?"),
        ("Is <image> it?", "Is ", " it?"),
    ],
)
def test_a_picture_stands_where_its_tag_is(tokenizer: Tokenizer, question: str, before: str, after: str) -> None:
    encoded = encode_conversation(turns(question, "A"), tokenizer, "mistral_instruct", **sizes(1))
    inside = [*tokenizer.encode(before), *PICTURE, *tokenizer.encode(after)]
    assert whole(encoded) == [1, 3, *inside, 4, *tokenizer.encode("A"), 2]
    assert encoded.num_images == 1


def test_a_system_text_stands_before_the_picture(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(turns("<image>\nQ", "A", system="S"), tokenizer, "mistral_instruct", **sizes(1))
    question = [*tokenizer.encode("S\n\n"), *PICTURE, *tokenizer.encode("Q")]
    assert whole(encoded) == [1, 3, *question, 4, *tokenizer.encode("A"), 2]


def test_plain_is_the_picture_and_the_last_answer(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(turns("<image>\nDescribe it.", "A cat."), tokenizer, "plain", **sizes(1))
    assert whole(encoded) == [1, *PICTURE, *tokenizer.encode("A cat."), 2]
    assert trained(encoded) == [*tokenizer.encode("A cat."), 2]
    two = encode_conversation(turns("<image>\nDescribe it.", "No.", "Do!", "A cat."), tokenizer, "plain", **sizes(1))
    assert two == encoded


@pytest.mark.parametrize(
    ("text", "pieces", "num_images"),
    [
        ("A cat. <image>\nTwo <image><image>", ["A cat. ", None, "\nTwo ", None, "", None, ""], 3),
        ("<image>", ["", None, ""], 1),
        ("No </s> picture\n", ["No </s> picture\n"], 0),
    ],
)
def test_a_document_is_trained_but_for_its_pictures(
    tokenizer: Tokenizer, text: str, pieces: list[str | None], num_images: int
) -> None:
    encoded = encode_document(text, tokenizer, **sizes(num_images))
    ids = [1] + [id for piece in pieces for id in (PICTURE if piece is None else tokenizer.encode(piece))] + [2]
    assert encoded.tokens == ids[:-1] and encoded.num_images == num_images
    assert encoded.labels == [0 if id == IMAGE else id for id in ids[1:]]
    assert encoded.loss_mask == [float(id != IMAGE) for id in ids[1:]]


def test_a_long_document_is_cut(tokenizer: Tokenizer) -> None:
    whole_text = encode_document("A <image> cat", tokenizer, **sizes(1))
    first = whole_text.tokens.index(IMAGE)
    cut = encode_document("A <image> cat", tokenizer, **sizes(1), seq_length=first + 3)
    assert cut.tokens == whole_text.tokens[: first + 3] and cut.labels == whole_text.labels[: first + 3]
    assert cut.was_cut and cut.num_images == 1 and not whole_text.was_cut
    with pytest.raises(ValueError, match="cuts through a picture"):
        encode_document("A <image> cat", tokenizer, **sizes(1), seq_length=first + 2)
    with pytest.raises(ValueError, match="nothing to train in the first 1 of"):
        encode_document("<image> cat", tokenizer, **sizes(1), seq_length=1)


def test_a_cut_keeps_pictures_whole(tokenizer: Tokenizer) -> None:
    talk = turns("<image>\nQ", "A", "<image>\nQ", "A")
    full = encode_conversation(talk, tokenizer, "mistral_instruct", **sizes(2))
    assert len(full.tokens) == 16 and full.num_images == 2
    results: dict[int, Any] = {}
    for length in range(1, 18):
        try:
            results[length] = encode_conversation(talk, tokenizer, "mistral_instruct", **sizes(2), seq_length=length)
        except ValueError as error:
            results[length] = str(error)
    first, second = range(2, 5), range(10, 13)  # places of the pictures
    for length, result in results.items():
        cuts = any(place[0] < length <= place[-1] for place in (first, second))
        if cuts:
            assert f"seq_length {length} cuts through a picture" in result
        elif length <= full.loss_mask.index(1.0):
            assert "nothing to train" in result
        else:
            assert result.tokens == full.tokens[:length] and result.labels == full.labels[:length]
            assert result.num_images == (length > 12) + 1 and result.was_cut == (length < 16)


def test_templates_and_control_tokens_are_checked(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no conversation template 'plane', did you mean 'plain'\?"):
        encode_conversation(turns("Q", "A"), tokenizer, "plane", **sizes(0))
    with pytest.raises(ValueError, match="2 <image> for 1 pictures"):
        encode_prompt("<image><image>", tokenizer, "plain", **sizes(1))


def test_ends_that_cannot_be_trained_are_dropped() -> None:
    rows = [("gpt", "Hi."), ("human", "Q"), ("gpt", "A"), ("human", "And?")]
    assert read_turns([{"from": who, "value": text} for who, text in rows]) == turns("Q", "A")
    rows = [("system", "S"), *rows]
    assert read_turns([{"from": who, "value": text} for who, text in rows]) == turns("Q", "A", system="S")


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (None, "a list of turns, not NoneType"),
        (["hi"], '{"from": ..., "value": text}'),
        ([{"from": "human", "value": 3}], '{"from": ..., "value": text}'),
        ([{"from": "user", "value": "Q"}], "not from 'user'"),
        ([], "no question with an answer"),
        ([{"from": "human", "value": "Q"}], "no question with an answer"),
        ([{"from": "human", "value": "Q"}] * 2 + [{"from": "gpt", "value": "A"}], "do not alternate"),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": " "}], "an answer is empty"),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a <image>"}], "an answer holds <image>"),
    ],
)
def test_a_conversation_that_is_none_is_refused(talk: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_turns(talk)
    assert message in str(caught.value)
