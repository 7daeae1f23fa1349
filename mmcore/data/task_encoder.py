"""A sample of a shard to tensors: first its sequence, later its pictures, so that what waits to be packed is files."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mmcore.data.batch import EncodedSample
from mmcore.data.conversation import (
    EncodedConversation,
    encode_conversation,
    encode_document,
    encode_prompt,
    read_turns,
)
from mmcore.data.image import EXTENSIONS
from mmcore.data.pictures import Pictures
from mmcore.data.tokenizer import Tokenizer

PICTURES = tuple(dict.fromkeys(EXTENSIONS.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All that decides what a sample's tensors are."""

    tokenizer: Tokenizer
    conversation: str
    pictures: Pictures
    seq_length: int
    loss_weighting: Literal["tokens", "sqrt_turn"] = "tokens"
    """See mmcore.config.TrainConfig."""


def build_layout(tokenizer: Tokenizer, conversation: str, pictures: Pictures, seq_length: int) -> Layout:
    """A layout that a run can use.

    Args:
        conversation: template, a name in mmcore.data.templates.TEMPLATES.
    Raises:
        ValueError: unknown template, or one that the tokenizer lacks tokens for; the tokenizer can make
            image_token_id of text; a picture does not fit into seq_length.
    """
    image_token_id = pictures.image_token_id
    if image_token_id < tokenizer.vocab_size and image_token_id not in tokenizer.control.values():
        raise ValueError(
            f"image_token_id {image_token_id} is a token of {tokenizer.path}, which has {tokenizer.vocab_size}: it "
            "must lie beyond them or be a control token; convert the model again with this tokenizer"
        )
    if (longest := pictures.longest(tokenizer)) >= seq_length:
        raise ValueError(
            f"seq-length {seq_length} has no room for a picture (up to {longest} tokens) and text: raise it"
        )
    encode_prompt("", tokenizer, conversation, pictures=[], image_token_id=image_token_id)  # raises if they do not fit
    return Layout(tokenizer=tokenizer, conversation=conversation, pictures=pictures, seq_length=seq_length)


def lay_out(parts: dict[str, bytes], layout: Layout) -> EncodedConversation:
    """A sample's sequence; reads no more of a picture than its header, and that only if its size matters.

    Raises:
        ValueError: there is no text, or it cannot be trained on, or it has places for other than the
            sample's pictures, or one of these is none.
    """
    if "json" not in parts:
        raise ValueError(f"no json beside {', '.join(parts)}")
    try:
        content = json.loads(parts["json"])
        # Half a surrogate pair, which JSON can spell and no tokenizer takes, is a ValueError here.
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("the json is nested too deeply") from None
    places: dict[str, Any] = {
        "pictures": [layout.pictures.ids(data, layout.tokenizer) for data in picture_files(parts)],
        "image_token_id": layout.pictures.image_token_id,
        "seq_length": layout.seq_length,
    }
    if isinstance(content, dict) and isinstance(content.get("text"), str):
        return encode_document(content["text"], layout.tokenizer, **places)
    turns = read_turns(content.get("conversations") if isinstance(content, dict) else None)
    return encode_conversation(turns, layout.tokenizer, layout.conversation, **places)


def picture_files(parts: dict[str, bytes]) -> list[bytes]:
    """Files of a sample's pictures in the order of their tags: one is `jpg`, several are `0.jpg`, `1.png`, ..."""
    found = []
    for name, data in parts.items():
        number, _, extension = name.rpartition(".")
        if extension in PICTURES and (not number or number.isdecimal()):
            found.append((int(number or 0), data))
    return [data for _, data in sorted(found, key=lambda picture: picture[0])]


def encode_sample(
    key: str, parts: dict[str, bytes], conversation: EncodedConversation, layout: Layout
) -> EncodedSample:
    """Tensors of a sample that is laid out.

    Raises:
        ValueError: a picture is broken.
    """
    pictures = layout.pictures.encode(picture_files(parts)[: conversation.num_images])
    ids, is_trained = np.frombuffer(conversation.ids, np.int64), np.frombuffer(conversation.is_trained, np.bool_)
    return EncodedSample(
        key=key,
        tokens=torch.from_numpy(ids)[:-1],
        labels=torch.from_numpy(np.where(is_trained, ids[1:], 0)),
        loss_mask=torch.from_numpy(loss_weights(is_trained, layout.loss_weighting)),
        images=pictures.images,
        image_sources=pictures.sources,
        num_features=pictures.num_features,
    )


def loss_weights(is_trained: NDArray[np.bool_], weighting: str) -> NDArray[np.float32]:
    """What each position of a sample counts in the loss.

    With "sqrt_turn", 1 / sqrt(n) in an answer of n trained tokens, its end token and what was not cut off
    counted. An answer is a stretch of trained positions; in a document, the text between two pictures.

    Source: square averaging of InternVL 2.5 (arXiv:2412.05271), whose loss is sum(w_i l_i) / sum(w_i) with
    w_i = 1 / sqrt(tokens of the response); its code (OpenGVLab/InternVL internvl_chat/internvl/train/
    dataset_packed.py at 5cd4f3d) takes all answers of a conversation for one response, which is the same where
    there is one.

    Args:
        is_trained: [s].
    Returns:
        float32 [s]; 0 where nothing is trained.
    """
    weights = is_trained.astype(np.float32)
    if weighting == "sqrt_turn":
        starts, ends = np.flatnonzero(np.diff(is_trained.astype(np.int8), prepend=0, append=0)).reshape(-1, 2).T
        lengths = ends - starts
        weights[is_trained] = np.repeat(1 / np.sqrt(lengths), lengths)
    return weights
