"""Conversations to token sequences: what the model reads, and what of it is trained.

A template is one function, and training and generation share it: a prompt is the training
sequence up to the place where the answer starts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mmcore.config import nearest
from mmcore.constants import IMAGE_TAG
from mmcore.data.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}  # as LLaVA's JSON names them


class Turn(NamedTuple):
    role: Role
    text: str


class Segment(NamedTuple):
    ids: list[int]
    is_trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedConversation:
    """A sequence of s positions, each with the token to predict there."""

    tokens: list[int]  # [s]; image_token_id once for every image embedding
    labels: list[int]  # [s]; the next token, 0 where it is not trained
    loss_mask: list[float]  # [s]; 1 where the next token is trained, else 0
    num_images: int
    was_cut: bool
    """Whether it was longer than seq_length."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Turns text and pictures into ids."""

    tokenizer: Tokenizer
    image: list[int]
    """Placeholders of one picture."""

    def question(self, text: str, before: str = "") -> list[int]:
        """Ids of what a user says after `before`; each image tag becomes a picture's placeholders.

        The line break that only keeps the tag apart from the text goes with the tag.
        """
        first, *rest = _split_at_images(text)
        ids = self.tokenizer.encode(before + first)
        for part in rest:
            ids = ids + self.image + self.tokenizer.encode(part)
        return ids

    def answer(self, text: str) -> list[int]:
        """Ids of what the assistant says, with the token that ends it."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]


def plain(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """Alignment: pictures, then the caption. What the user asks is dropped.

    Source: LLaVA llava/train/train.py, preprocess_plain, at 0034661; there a line break ends the
    caption, here the end token does, so that generation stops by itself.
    """
    num_images = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    yield Segment([write.tokenizer.bos_id, *(write.image * num_images)], False)
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if answers:
        yield Segment(write.answer(answers[-1]), True)


def mistral_instruct(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """Mistral's v3: `<s>[INST] question[/INST] answer</s>[INST] ...`; a system text opens the last question.

    Source: mistral-common 1.13.1, InstructTokenizerV3: the same ids for the same texts.
    """
    start, end = write.tokenizer.special("[INST]"), write.tokenizer.special("[/INST]")
    last = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=-1)
    system = "".join(f"{turn.text}\n\n" for turn in turns if turn.role == "system")
    yield Segment([write.tokenizer.bos_id], False)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            yield Segment([start, *write.question(turn.text, system if index == last else ""), end], False)
        elif turn.role == "assistant":
            yield Segment(write.answer(turn.text.rstrip(" ")), True)


Template = Callable[[Sequence[Turn], Writer], Iterator[Segment]]

TEMPLATES: dict[str, Template] = {
    "plain": plain,
    "mistral_instruct": mistral_instruct,
}


def find_template(name: str) -> Template:
    """The template of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name not in TEMPLATES:
        raise ValueError(
            f"there is no conversation template {name!r}{nearest(name, TEMPLATES)} (templates: {', '.join(TEMPLATES)})"
        )
    return TEMPLATES[name]


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
    write = Writer(tokenizer, [image_token_id] * num_image_embeddings)
    ids: list[int] = []
    trained: list[bool] = []
    for segment in find_template(template)(turns, write):
        ids += segment.ids
        trained += [segment.is_trained] * len(segment.ids)
    length = len(ids) - 1
    kept = length if seq_length is None else min(length, seq_length)
    tokens, following, trained = ids[:kept], ids[1 : kept + 1], trained[1 : kept + 1]
    num_images, broken = divmod(tokens.count(image_token_id), num_image_embeddings)
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


def encode_prompt(
    question: str,
    tokenizer: Tokenizer,
    template: str,
    *,
    num_image_embeddings: int,
    image_token_id: int,
    has_image: bool,
) -> list[int]:
    """Lay out one question up to where its answer starts: the head of what training lays out.

    A picture stands where the question has its tag, or first.

    Raises:
        ValueError: unknown template, a control token that the tokenizer lacks, or more tags than
            pictures.
    """
    if has_image and IMAGE_TAG not in question:
        question = f"{IMAGE_TAG}\n{question}"
    if question.count(IMAGE_TAG) != int(has_image):
        raise ValueError(
            f"the question has {question.count(IMAGE_TAG)} {IMAGE_TAG} for {int(has_image)} picture: {question[:80]!r}"
        )
    write = Writer(tokenizer, [image_token_id] * num_image_embeddings)
    return [id for segment in find_template(template)([Turn("user", question)], write) for id in segment.ids]


def _split_at_images(text: str) -> list[str]:
    parts = text.split(IMAGE_TAG)
    last = len(parts) - 1
    return [
        part.removeprefix("\n" if index > 0 else "").removesuffix("\n" if index < last else "")
        for index, part in enumerate(parts)
    ]
