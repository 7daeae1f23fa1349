"""Conversation templates: how each family of language models marks who speaks.

One function a template. It lays out whole conversations, or those that end with a question: up to the
place where the answer starts, so that a prompt is the head of what is trained. Control tokens are
placed here and nowhere else, and every stretch of text between them is encoded as one, as an engine
does that encodes the whole conversation at once.

A stretch is cut in one place, where an answer begins, since generation begins there. Only an answer
that begins with a line break, behind one of the template, can get other tokens by that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mmcore.checks import nearest
from mmcore.constants import IMAGE_TAG
from mmcore.data.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    role: Role
    text: str


class Segment(NamedTuple):
    ids: list[int]
    is_trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Turns text into ids, with one placeholder for each picture: `conversation` puts the pictures in."""

    tokenizer: Tokenizer
    image_token_id: int
    """What stands for a picture; no text can make it."""
    end_id: int
    """What ends an answer."""

    @property
    def start(self) -> list[int]:
        """The start token, or nothing where the vocabulary has none."""
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    def text(self, text: str) -> list[int]:
        """Ids of a text that stands by itself; each image tag becomes a picture's placeholder."""
        first, *rest = text.split(IMAGE_TAG)
        ids = self.tokenizer.encode(first)
        for part in rest:
            ids = [*ids, self.image_token_id, *self.tokenizer.encode(part)]
        return ids

    def answer(self, text: str) -> list[int]:
        """Ids of an answer right after a control token or a picture, with the token that ends it."""
        return [*self.tokenizer.encode(text), self.end_id]

    def continued(self, text: str) -> list[int]:
        """Ids of an answer that goes on after text, with the token that ends it."""
        return [*self.tokenizer.follow(text), self.end_id]


def plain(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """Alignment: pictures, then the caption. What the user asks is dropped.

    Source: LLaVA llava/train/train.py, preprocess_plain, at 0034661; there a line break ends the
    caption, here the end token does, so that generation stops by itself.
    """
    num_images = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    yield Segment([*write.start, *[write.image_token_id] * num_images], False)
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if answers:
        yield Segment(write.answer(answers[-1]), True)


def mistral_instruct(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """Mistral's v2 and v3: `<s>[INST] question[/INST] answer</s>[INST] ...`; a system text opens the last question.

    Source: mistral-common 1.13.1, InstructTokenizerV2 and V3: the same ids for the same texts.
    """
    start, end = write.tokenizer.special("[INST]"), write.tokenizer.special("[/INST]")
    last = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=-1)
    system = "".join(f"{turn.text}\n\n" for turn in turns if turn.role == "system" and turn.text)
    yield Segment(write.start, False)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            text = (system if index == last else "") + _without_breaks(turn.text)
            yield Segment([start, *write.text(text), end], False)
        elif turn.role == "assistant":
            yield Segment(write.answer(turn.text.rstrip(" ")), True)


def mistral_instruct_v1(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """Mistral's v1: `<s>[INST] question [/INST] answer</s>[INST] ...`; a system text opens the first question.

    The brackets are text, so a question can spell them. Source: mistral-common 1.13.1,
    InstructTokenizerV1: the same ids for the same texts.
    """
    system, talk = _parted(turns)
    opening = f"{system}\n\n" if system else ""
    yield Segment(write.start, False)
    for turn in talk:
        if turn.role == "user":
            yield Segment(write.text(f"[INST] {opening}{_without_breaks(turn.text)} [/INST]"), False)
            opening = ""
        else:
            yield Segment(write.continued(f" {turn.text}"), True)


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def vicuna_v1(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """Vicuna 1.1 and 1.5, and LLaVA's on them: `<s>system USER: question ASSISTANT: answer</s>USER: ...`.

    Source: LLaVA llava/conversation.py, conv_vicuna_v1, at c121f04. (There an empty question is one
    to be answered, and loses its spaces.)
    """
    system, talk = _parted(turns)
    opening = f"{VICUNA_SYSTEM if system is None else system} "
    yield Segment(write.start, False)
    for turn in talk:
        if turn.role == "user":
            yield Segment(write.text(f"{opening}USER: {turn.text} ASSISTANT:"), False)
            opening = ""
        else:
            yield Segment(write.continued(f" {turn.text}"), True)


def llama2_chat(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """LLaMA 2 chat: `<s>[INST] <<SYS>>...<</SYS>> question [/INST] answer </s>`, each round by itself.

    The brackets are text, so a question can spell them. Source: meta-llama/llama
    llama/generation.py, chat_completion, and the chat template in tokenizer_config.json of
    meta-llama/Llama-2-7b-chat-hf.
    """
    system, talk = _parted(turns)
    opening = "" if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
    for turn in talk:
        if turn.role == "user":
            yield Segment([*write.start, *write.text(f"[INST] {(opening + turn.text).strip()} [/INST]")], False)
            opening = ""
        else:
            yield Segment(write.continued(f" {turn.text.strip()} "), True)


def llama2_chat_tagged(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """LLaMA 2 chat with each picture between `<<IMG>>` and `<</IMG>>`, which are text.

    Source: michaelnny/MM-LLaMA mm_llama/utils/prompt_builder.py, build_prompt_completion, at 7850b7d.
    There a picture always follows its question, behind a space; here it stands where its tag does.
    Answers are as in LLaMA 2 chat, so a space ends them, which its code leaves out.
    """
    tagged = [turn._replace(text=turn.text.replace(IMAGE_TAG, f"<<IMG>>{IMAGE_TAG}<</IMG>>")) for turn in turns]
    return llama2_chat(tagged, write)


def llama3(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """LLaMA 3: every turn is `<|start_header_id|>role<|end_header_id|>`, two line breaks, text, `<|eot_id|>`.

    Source: meta-llama/llama3 llama/tokenizer.py, ChatFormat, and the chat template in
    tokenizer_config.json of meta-llama/Meta-Llama-3-8B-Instruct. (That of 3.1 adds today's date.)
    """
    special = write.tokenizer.special
    start, end, eot = (special(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id"))

    def opened(role: Role, text: str) -> list[int]:
        return [start, *write.text(role), end, *write.text(f"\n\n{text}")]

    yield Segment(write.start, False)
    for turn in turns:
        if turn.role == "assistant":
            yield Segment(write.continued(turn.text.strip()), True)
        else:
            answer = opened("assistant", "") if turn.role == "user" else []
            yield Segment([*opened(turn.role, turn.text.strip()), eot, *answer], False)


QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def chatml(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """Qwen2.5's ChatML: every turn is `<|im_start|>role`, a line break, text, `<|im_end|>`; there is no start token.

    Source: the chat template in tokenizer_config.json of Qwen/Qwen2.5-7B-Instruct, without tools,
    which also puts its own system text where there is none.
    """
    system, talk = _parted(turns)
    first = Turn("system", QWEN_SYSTEM if system is None else system)
    return _im_turns([first, *talk], write, [])


def internlm2(turns: Sequence[Turn], write: Writer) -> Iterator[Segment]:
    """InternLM2 and MOSS2: turns as in ChatML after a start token, without a system text of its own.

    Source: the chat template in tokenizer_config.json of internlm/internlm2-chat-7b.
    """
    return _im_turns(turns, write, write.start)


def _im_turns(turns: Sequence[Turn], write: Writer, before: list[int]) -> Iterator[Segment]:
    """Line breaks stand between turns: behind the last there is nothing to learn from one."""
    start, end = write.tokenizer.special("<|im_start|>"), write.tokenizer.special("<|im_end|>")
    line_break = write.text("\n")
    for turn in turns:
        if turn.role == "assistant":
            yield Segment(write.continued(turn.text), True)
        else:
            answer = [*line_break, start, *write.text("assistant\n")] if turn.role == "user" else []
            yield Segment([*before, start, *write.text(f"{turn.role}\n{turn.text}"), end, *answer], False)
        before = line_break


def _parted(turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn]]:
    """The system text, if there is one, and what follows it."""
    return (turns[0].text, turns[1:]) if turns and turns[0].role == "system" else (None, turns)


def _without_breaks(text: str) -> str:
    """A line break that only keeps an image tag apart from the text goes; LLaVA's own models have it, Mistral's not."""
    return text.replace(f"{IMAGE_TAG}\n", IMAGE_TAG).replace(f"\n{IMAGE_TAG}", IMAGE_TAG)


@dataclass(frozen=True, slots=True)
class Template:
    """One row of `TEMPLATES`."""

    lay_out: Callable[[Sequence[Turn], Writer], Iterator[Segment]]
    end: str = ""
    """Control token that ends an answer; if empty, the tokenizer's end token."""

    def end_id(self, tokenizer: Tokenizer) -> int:
        """Id that ends an answer: the last that is trained, and where generation stops.

        Raises:
            ValueError: the tokenizer lacks it.
        """
        return tokenizer.special(self.end) if self.end else tokenizer.eos_id


# By the names of Architecture.conversation.
TEMPLATES = {
    "plain": Template(plain),
    "mistral_instruct": Template(mistral_instruct),
    "mistral_instruct_v1": Template(mistral_instruct_v1),
    "vicuna_v1": Template(vicuna_v1),
    "llama2_chat": Template(llama2_chat),
    "llama2_chat_tagged": Template(llama2_chat_tagged),
    "llama3": Template(llama3, "<|eot_id|>"),
    "chatml": Template(chatml, "<|im_end|>"),
    "internlm2": Template(internlm2, "<|im_end|>"),
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
