"""A sample as training sees it, for people to look at: its pictures, its squares, its tokens one by one."""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from mmcore.data.conversation import EncodedConversation
from mmcore.data.image import decode_image
from mmcore.data.inspection import Plan, locate, open_plan, unlimited
from mmcore.data.task_encoder import Layout, encode_sample, lay_out, picture_files
from mmcore.data.tokenizer import Tokenizer

# Pixels of the longer side: larger pictures are shown smaller, and smaller ones without loss.
THUMBNAIL, SMALL = 512, 128

# Tokens that may make up one character: UTF-8 has at most 4 bytes.
MAX_BYTES = 4

REPLACEMENT = "\ufffd"


def show(plan: Plan, number: int) -> dict[str, Any]:
    """A sample of a plan, as plain values.

    Returns:
        source, shard, key; error, why it is not trained on, or nothing; was_cut; text, what its json
        holds; pieces, as `pieces` gives them; pictures and squares, data URIs of what its files show and of
        what the vision tower takes.
    """
    source, index = locate(plan, number)
    shown: dict[str, Any] = {"source": source.name, "shard": "", "key": "", "error": "", "was_cut": False, "text": ""}
    shown |= {"pieces": [], "pictures": [], "squares": []}
    try:
        raw = source.read(index)
        if raw is None:
            return shown | {"error": "the dataset's metadata leaves it out"}
    except ValueError as error:
        return shown | {"error": str(error)}
    shown |= {"shard": raw.shard, "key": raw.key, "text": raw.parts.get("json", b"").decode("utf-8", "replace")}
    shown["pictures"] = list(_pictures(picture_files(raw.parts)))
    layout = open_plan(plan).layout
    conversation, shown["error"] = _lay_out(raw.parts, layout)
    if conversation is None:
        return shown
    shown["was_cut"] = conversation.was_cut
    shown["pieces"] = list(pieces(conversation, layout))
    try:
        squares = encode_sample(raw.key, raw.parts, conversation, layout).images
    except ValueError as error:
        return shown | {"error": shown["error"] or str(error)}
    shown["squares"] = [data_uri(_image(square)) for square in squares]
    return shown


def pieces(conversation: EncodedConversation, layout: Layout) -> Iterator[dict[str, Any]]:
    """The sequence and the token that its last position predicts, cut where it makes sense to look at.

    Yields:
        text; ids, several where they make one character or one picture (or tile); kind: "text", "control", "image",
        or "unknown" where the tokenizer has no such id; trained, whether they are predicted.
    """
    ids = conversation.tokens + (conversation.labels[-1:] if conversation.loss_mask[-1] else [])
    trained = [False, *(weight > 0 for weight in conversation.loss_mask)]
    tokenizer, image_token_id = layout.tokenizer, layout.pictures.image_token_id
    # Tiles of one picture stand as one, unless there is text between them.
    longest = layout.pictures.num_square_embeddings if layout.pictures.tiling == "none" else len(ids)
    names = {id: name for name, id in tokenizer.control.items()}
    place = 0
    while place < len(ids):
        id = ids[place]
        end, text, kind = place + 1, "", "text"
        if id == image_token_id:
            kind = "image"
            while end < len(ids) and ids[end] == id and end - place < longest:
                end += 1
        elif id in names:
            kind, text = "control", names[id]
        elif not 0 <= id < tokenizer.vocab_size:
            kind = "unknown"
        else:
            end = _character_end(ids, place, trained, tokenizer)
            text = _decode(ids[place:end], tokenizer)
        yield {"text": text, "ids": ids[place:end], "kind": kind, "trained": trained[place]}
        place = end


def _character_end(ids: Sequence[int], place: int, trained: Sequence[bool], tokenizer: Tokenizer) -> int:
    """Where the token ends, or the last of those that make one character byte by byte."""
    for end in range(place + 1, min(place + MAX_BYTES, len(ids)) + 1):
        if len(set(trained[place:end])) > 1:
            break
        if REPLACEMENT not in _decode(ids[place:end], tokenizer):
            return end
    return place + 1


def _decode(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of tokens in the middle of a text: what opens a text would lose the space before it."""
    before = tokenizer.encode("a")[-1:]
    return tokenizer.decode_text([*before, *ids])[len(tokenizer.decode_text(before)) :]


def _lay_out(parts: dict[str, bytes], layout: Layout) -> tuple[EncodedConversation | None, str]:
    """What is trained on, or else what would be in a longer window, with the reason that it is not."""
    try:
        return lay_out(parts, layout), ""
    except ValueError as error:
        reason = str(error)
    try:
        return lay_out(parts, unlimited(layout)), reason
    except ValueError:
        return None, reason


def _pictures(files: Sequence[bytes]) -> Iterator[str]:
    for data in files:
        try:
            yield data_uri(decode_image(data))
        except ValueError:  # the sample's error says so
            continue


def _image(square: Tensor) -> Image.Image:
    return Image.fromarray(square.permute(1, 2, 0).contiguous().numpy())


def data_uri(image: Image.Image) -> str:
    """A picture in mode RGB as an address that holds it."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "PNG" if max(image.size) <= SMALL else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
