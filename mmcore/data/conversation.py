"""Conversations and documents to token sequences: what the model reads, and what of it is trained."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmcore.constants import IMAGE_TAG
from mmcore.data.templates import Role, Segment, Turn, Writer, find_template
from mmcore.data.tokenizer import Tokenizer

ROLES: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}  # as LLaVA's JSON names them


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedConversation:
    """A sequence of s positions, each with the token to predict there."""

    tokens: list[int]  # [s]; image_token_id once for every image embedding
    labels: list[int]  # [s]; the next token, 0 where it is not trained
    loss_mask: list[float]  # [s]; 1 where the next token is trained, else 0
    num_images: int
    was_cut: bool
    """Whether it was longer than seq_length."""


def read_turns(conversations: Any) -> list[Turn]:
    """Turns of a LLaVA conversation, [{"from": "human" | "gpt" | "system", "value": text}, ...].

    What cannot be trained at its two ends is dropped: an answer before any question (as LLaVA's own
    trainer does) and a question without an answer.

    Raises:
        ValueError: not such a list, an unknown role, questions and answers do not alternate, an
            answer is empty or holds an image tag, or there is no answer.
    """
    if not isinstance(conversations, list):
        raise ValueError(f"a conversation is a list of turns, not {type(conversations).__name__}")
    turns = []
    for item in conversations:
        if not isinstance(item, dict) or not isinstance(item.get("value"), str):
            raise ValueError('a turn is {"from": ..., "value": text}')
        if item.get("from") not in ROLES:
            raise ValueError(f"a turn is from {', '.join(ROLES)}, not from {item.get('from')!r}")
        turns.append(Turn(ROLES[item["from"]], item["value"]))
    system = [turn for turn in turns[:1] if turn.role == "system"]
    talk = turns[len(system) :]
    if talk and talk[0].role == "assistant":
        talk = talk[1:]
    if talk and talk[-1].role == "user":
        talk = talk[:-1]
    if not talk:
        raise ValueError("no question with an answer")
    if [turn.role for turn in talk] != ["user", "assistant"] * (len(talk) // 2):
        raise ValueError("questions and answers do not alternate")
    for turn in talk[1::2]:
        if not turn.text.strip():
            raise ValueError("an answer is empty")
        if IMAGE_TAG in turn.text:
            raise ValueError(f"an answer holds {IMAGE_TAG}: a picture belongs to a question")
    return system + talk


def encode_conversation(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: str,
    *,
    num_image_embeddings: int,
    image_token_id: int,
    seq_length: int | None = None,
) -> EncodedConversation:
    """Lay out a conversation for training: only answers and the tokens that end them are trained.

    Args:
        num_image_embeddings: places of one picture.
        image_token_id: what stands there; outside the tokenizer's vocabulary.
        seq_length: longest sequence; what is beyond it is cut off, pictures whole.
    Raises:
        ValueError: unknown template, a control token that the tokenizer lacks, a cut through a
            picture, or nothing to train in what is left.
    """
    found = find_template(template)
    image = [image_token_id] * num_image_embeddings
    write = Writer(tokenizer=tokenizer, image=image, end_id=found.end_id(tokenizer))
    return _encoded(found.lay_out(turns, write), image, seq_length)


def encode_document(
    text: str,
    tokenizer: Tokenizer,
    *,
    num_image_embeddings: int,
    image_token_id: int,
    seq_length: int | None = None,
) -> EncodedConversation:
    """Lay out text with pictures among it for pretraining: all is trained but the pictures' places.

    The text stands between the start and the end token as it is; each image tag in it becomes a
    picture.

    Args:
        num_image_embeddings: places of one picture.
        image_token_id: what stands there; outside the tokenizer's vocabulary.
        seq_length: longest sequence; what is beyond it is cut off, pictures whole.
    Raises:
        ValueError: a cut through a picture, or nothing to train in what is left.
    """
    image = [image_token_id] * num_image_embeddings
    write = Writer(tokenizer=tokenizer, image=image, end_id=tokenizer.eos_id)
    first, *rest = text.split(IMAGE_TAG)
    segments = [Segment(write.start, False), Segment(write.text(first), True)]
    for part in rest:
        segments += [Segment(image, False), Segment(write.text(part), True)]
    return _encoded([*segments, Segment([write.end_id], True)], image, seq_length)


def encode_prompt(
    question: str,
    tokenizer: Tokenizer,
    template: str,
    *,
    num_image_embeddings: int,
    image_token_id: int,
    num_images: int,
) -> list[int]:
    """Lay out one question up to where its answer starts: the head of what training lays out.

    Pictures stand where the question has its tags, or first if it has none.

    Raises:
        ValueError: unknown template, a control token that the tokenizer lacks, or another number of
            tags than of pictures.
    """
    if IMAGE_TAG not in question:
        question = f"{IMAGE_TAG}\n" * num_images + question
    if question.count(IMAGE_TAG) != num_images:
        raise ValueError(
            f"the question has {question.count(IMAGE_TAG)} {IMAGE_TAG} for {num_images} pictures: {question[:80]!r}"
        )
    found = find_template(template)
    write = Writer(tokenizer=tokenizer, image=[image_token_id] * num_image_embeddings, end_id=found.end_id(tokenizer))
    return [id for segment in found.lay_out([Turn("user", question)], write) for id in segment.ids]


def _encoded(segments: Iterable[Segment], image: list[int], seq_length: int | None) -> EncodedConversation:
    """Join segments, cut what is too long, and give each position the token that follows it."""
    ids: list[int] = []
    trained: list[bool] = []
    for segment in segments:
        ids += segment.ids
        trained += [segment.is_trained] * len(segment.ids)
    length = len(ids) - 1
    kept = length if seq_length is None else min(length, seq_length)
    tokens, following, trained = ids[:kept], ids[1 : kept + 1], trained[1 : kept + 1]
    num_images, broken = divmod(tokens.count(image[0]), len(image))
    if broken:
        raise ValueError(f"seq_length {seq_length} cuts through a picture (the sequence has {length} tokens)")
    if not any(trained):
        raise ValueError(f"nothing to train in the first {kept} of {length} tokens")
    return EncodedConversation(
        tokens=tokens,
        labels=[id if is_trained else 0 for id, is_trained in zip(following, trained, strict=True)],
        loss_mask=[1.0 if is_trained else 0.0 for is_trained in trained],
        num_images=num_images,
        was_cut=kept < length,
    )
