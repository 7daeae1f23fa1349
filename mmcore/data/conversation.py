"""Conversations and documents to token sequences: what the model reads, and what of it is trained."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmcore.constants import IMAGE_TAG
from mmcore.data.templates import Role, Segment, Turn, Writer, find_template
from mmcore.data.tokenizer import Tokenizer

ROLES: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}  # as LLaVA's JSON names them


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedConversation:
    """A sequence of s positions, each with the token to predict there."""

    ids: "array[int]"  # [s + 1]; image_token_id once for every image embedding, and the token after the last position
    is_trained: bytearray  # [s]; 1 or 0, whether a position's next token is
    num_images: int
    """Pictures that are left in it, which are the first ones."""
    was_cut: bool
    """Whether it was longer than seq_length."""

    def __len__(self) -> int:
        return len(self.is_trained)

    @property
    def tokens(self) -> list[int]:
        """[s]; what the model reads."""
        return self.ids[:-1].tolist()

    @property
    def labels(self) -> list[int]:
        """[s]; the next token, 0 where it is not trained."""
        return [id if is_trained else 0 for id, is_trained in zip(self.ids[1:], self.is_trained, strict=True)]

    @property
    def loss_mask(self) -> list[float]:
        """[s]; 1 where the next token is trained, else 0."""
        return [float(is_trained) for is_trained in self.is_trained]


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
    pictures: Sequence[Sequence[int]],
    image_token_id: int,
    seq_length: int | None = None,
) -> EncodedConversation:
    """Lay out a conversation for training: only answers and the tokens that end them are trained.

    Args:
        pictures: sequence of each picture, in the order of the tags, as `Pictures.ids` gives it.
        image_token_id: stands in them once for every embedding; no text can make it.
        seq_length: longest sequence; what is beyond it is cut off, pictures whole.
    Raises:
        ValueError: unknown template, a control token that the tokenizer lacks, other tags than
            pictures, a cut through a picture, or nothing to train in what is left.
    """
    found = find_template(template)
    write = Writer(tokenizer=tokenizer, image_token_id=image_token_id, end_id=found.end_id(tokenizer))
    return _encoded(found.lay_out(turns, write), pictures, image_token_id, seq_length)


def encode_document(
    text: str,
    tokenizer: Tokenizer,
    *,
    pictures: Sequence[Sequence[int]],
    image_token_id: int,
    seq_length: int | None = None,
) -> EncodedConversation:
    """Lay out text with pictures among it for pretraining: all is trained but the pictures' places.

    The text stands between the start and the end token as it is; each image tag in it becomes a
    picture.

    Args:
        pictures: sequence of each picture, in the order of the tags, as `Pictures.ids` gives it.
        image_token_id: stands in them once for every embedding; no text can make it.
        seq_length: longest sequence; what is beyond it is cut off, pictures whole.
    Raises:
        ValueError: other tags than pictures, a cut through a picture, or nothing to train in what is
            left.
    """
    write = Writer(tokenizer=tokenizer, image_token_id=image_token_id, end_id=tokenizer.eos_id)
    first, *rest = text.split(IMAGE_TAG)
    segments = [Segment(write.start, False), Segment(write.text(first), True)]
    for part in rest:
        segments += [Segment([image_token_id], False), Segment(write.text(part), True)]
    return _encoded([*segments, Segment([write.end_id], True)], pictures, image_token_id, seq_length)


def encode_prompt(
    question: str,
    tokenizer: Tokenizer,
    template: str,
    *,
    pictures: Sequence[Sequence[int]],
    image_token_id: int,
) -> list[int]:
    """Lay out one question up to where its answer starts: the head of what training lays out.

    Pictures stand as in `with_tags`; they and image_token_id are as in `encode_conversation`.

    Raises:
        ValueError: unknown template, a control token that the tokenizer lacks, or another number of
            tags than of pictures.
    """
    turns = [Turn("user", with_tags(question, len(pictures)))]
    return encode_turns(turns, tokenizer, template, pictures=pictures, image_token_id=image_token_id)


def with_tags(question: str, num_pictures: int) -> str:
    """A question with its pictures' tags: where it has them, or first if it has none.

    Raises:
        ValueError: another number of tags than of pictures.
    """
    if IMAGE_TAG not in question:
        question = f"{IMAGE_TAG}\n" * num_pictures + question
    if (num_tags := question.count(IMAGE_TAG)) != num_pictures:
        raise ValueError(f"the question has {num_tags} {IMAGE_TAG} for {num_pictures} pictures: {question[:80]!r}")
    return question


def encode_turns(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: str,
    *,
    pictures: Sequence[Sequence[int]],
    image_token_id: int,
) -> list[int]:
    """Lay out a conversation up to where the answer to its last question starts: the head of what training lays out.

    Args:
        turns: questions and answers in turn, a question last; a system text may open them.
        pictures, image_token_id: as in `encode_conversation`.
    Raises:
        ValueError: other turns, unknown template, a control token that the tokenizer lacks, or another
            number of tags than of pictures.
    """
    talk = turns[1:] if turns and turns[0].role == "system" else turns
    if [turn.role for turn in talk] != [*["user", "assistant"] * (len(talk) // 2), "user"]:
        roles = ", ".join(turn.role for turn in turns) or "none"
        raise ValueError(
            "a conversation is at most one system text, then questions of the user and answers of the assistant in "
            f"turn, a question last; these turns are of: {roles}"
        )
    found = find_template(template)
    write = Writer(tokenizer=tokenizer, image_token_id=image_token_id, end_id=found.end_id(tokenizer))
    *head, _ = found.lay_out([*turns, Turn("assistant", "")], write)  # every template ends with the answer
    return _joined(head, pictures, image_token_id).ids.tolist()


class _Joined(NamedTuple):
    """A whole conversation, in arrays, which make tensors ten times as fast as lists do."""

    ids: "array[int]"
    trained: bytearray
    places: list[range]
    """Of each picture."""


def _joined(segments: Iterable[Segment], pictures: Sequence[Sequence[int]], image_token_id: int) -> _Joined:
    """Join segments, each placeholder replaced by its picture."""
    joined = _Joined(array("q"), bytearray(), [])
    num_tags = 0
    for segment in segments:
        start = 0
        for _ in range(segment.ids.count(image_token_id)):
            tag = segment.ids.index(image_token_id, start)
            joined.ids.extend(segment.ids[start:tag])
            picture = pictures[num_tags] if num_tags < len(pictures) else ()
            joined.places.append(range(len(joined.ids), len(joined.ids) + len(picture)))
            joined.ids.extend(picture)
            num_tags, start = num_tags + 1, tag + 1
        joined.ids.extend(segment.ids[start:])
        joined.trained.extend(bytes([segment.is_trained]) * (len(joined.ids) - len(joined.trained)))
    if num_tags != len(pictures):
        raise ValueError(f"{num_tags} {IMAGE_TAG} for {len(pictures)} pictures")
    return joined


def _encoded(
    segments: Iterable[Segment], pictures: Sequence[Sequence[int]], image_token_id: int, seq_length: int | None
) -> EncodedConversation:
    """Join segments, cut what is too long, and give each position the token that follows it."""
    ids, trained, places = _joined(segments, pictures, image_token_id)
    length = len(ids) - 1
    kept = length if seq_length is None else min(length, seq_length)
    if any(place.start < kept < place.stop for place in places):
        raise ValueError(f"seq_length {seq_length} cuts through a picture (the sequence has {length} tokens)")
    is_trained = trained[1 : kept + 1]
    if not any(is_trained):
        raise ValueError(f"nothing to train in the first {kept} of {length} tokens")
    return EncodedConversation(
        ids=ids[: kept + 1],
        is_trained=is_trained,
        num_images=sum(place.stop <= kept for place in places),
        was_cut=kept < length,
    )
