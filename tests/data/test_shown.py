"""Token by token: what is shown is what is trained."""

import json
from array import array
from pathlib import Path

import pytest

from mmcore.data.conversation import EncodedConversation
from mmcore.data.pictures import Pictures
from mmcore.data.shown import pieces
from mmcore.data.task_encoder import Layout, lay_out
from mmcore.data.tokenizer import load_tokenizer
from tests.data.fabricated import conversation, picture, write_tokenizer
from tests.data.vocabularies import byte_level, spaced

IMAGE = 100_000


def build_layout(folder: Path, template: str) -> Layout:
    settings = Pictures(image_token_id=IMAGE, image_size=16, num_square_embeddings=4, background=(0, 0, 0))
    return Layout(tokenizer=load_tokenizer(folder), conversation=template, pictures=settings, seq_length=500)


def encoded(layout: Layout, question: str, answer: str, num_pictures: int = 0) -> EncodedConversation:
    parts = {f"{number}.png": picture(number) for number in range(num_pictures)}
    parts["json"] = json.dumps({"conversations": conversation(question, answer)}).encode()
    return lay_out(parts, layout)


def write(folder: Path, kind: str) -> Path:
    if kind == "sentencepiece":
        return write_tokenizer(folder)
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    return (spaced if kind == "spaced" else byte_level)(folder, special)


@pytest.mark.parametrize("kind", ["sentencepiece", "spaced", "byte_level"])
def test_all_tokens_are_there_and_the_trained_ones_spell_the_answer(tmp_path: Path, kind: str) -> None:
    layout = build_layout(write(tmp_path, kind), "vicuna_v1")
    answer = "it is \u00e9t\u00e9,\n\u4f60 \U0001f600 <s>"
    whole = encoded(layout, "<image>\nwhat <image> is it", answer, 2)
    shown = list(pieces(whole, layout))
    ids = [id for piece in shown for id in piece["ids"]]
    assert ids == [*whole.tokens, whole.labels[-1]]
    trained = [id for piece in shown if piece["trained"] for id in piece["ids"]]
    assert trained == [label for label, weight in zip(whole.labels, whole.loss_mask, strict=True) if weight]
    texts = "".join(piece["text"] for piece in shown if piece["trained"] and piece["kind"] == "text")
    assert texts.strip(" ") == answer
    assert "".join(piece["text"] for piece in shown if piece["kind"] == "text").count("what") == 1
    assert [piece["ids"] for piece in shown if piece["kind"] == "image"] == [[IMAGE] * 4] * 2
    assert (shown[0]["text"], shown[0]["kind"]) == ("<s>", "control")
    assert (shown[-1]["text"], shown[-1]["kind"], shown[-1]["trained"]) == ("</s>", "control", True)


def test_pictures_that_touch_are_told_apart(tmp_path: Path) -> None:
    layout = build_layout(write_tokenizer(tmp_path), "plain")
    shown = list(pieces(encoded(layout, "<image><image>", "one", 2), layout))
    assert [piece["ids"] for piece in shown if piece["kind"] == "image"] == [[IMAGE] * 4] * 2


def test_an_id_that_is_none_and_half_a_character(tmp_path: Path) -> None:
    layout = build_layout(write_tokenizer(tmp_path), "plain")
    half = layout.tokenizer.encode("\u00e9")[-1]
    told = EncodedConversation(
        ids=array("q", [999, half, 5, 7]), is_trained=bytearray([0, 0, 1]), num_images=0, was_cut=False
    )
    shown = list(pieces(told, layout))
    assert [piece["kind"] for piece in shown][:2] == ["unknown", "text"]
    assert shown[1]["text"] == "\ufffd" and shown[1]["ids"] == [half]
    assert [piece["trained"] for piece in shown] == [False, False, False, True]
