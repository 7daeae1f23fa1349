"""A replica's share of a task's examples, answered row by row."""

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from mmcore import distributed
from mmcore.data.tokenizer import Tokenizer
from mmcore.evaluation.task import Example
from mmcore.inference.answers import choice_tokens, end_ids, layout
from mmcore.inference.engine import Engine, Request
from mmcore.inference.option_loss import Question, choose_options
from mmcore.inference.parts import Row
from mmcore.inference.sampling import Sampling
from mmcore.models.architecture import Architecture
from mmcore.models.llava import LlavaModel

Item = TypeVar("Item")
Result = TypeVar("Result")

# Threads that read and decode pictures.
NUM_READERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How examples are answered."""

    answer_by: Literal["text", "option-loss"]
    """What the model writes, or which of the example's choices it finds the least surprising."""
    sampling: Sampling
    """Of all examples; each draws by a seed of its own, made of this one's and its id."""
    max_new_tokens: int
    stop: tuple[str, ...]
    batch_size: int
    """Most that are answered at once."""
    max_prefill_tokens: int = 8192
    """As of `Engine`; of choices as well."""


def answer_examples(
    model: LlavaModel,
    tokenizer: Tokenizer,
    architecture: Architecture,
    examples: Sequence[Example],
    asking: Asking,
    on_row: Callable[[Row, int], None],
) -> None:
    """Answer examples; all ranks of a replica call it with the same ones, the model in evaluation mode.

    Args:
        on_row: told on the replica's main rank every answer, as they come, and how many tokens it took.
    Raises:
        ValueError: a picture is missing or broken, or a choice is empty.
    """
    if asking.answer_by == "text":
        _write(model, tokenizer, architecture, examples, asking, on_row)
    else:
        _choose(model, tokenizer, architecture, examples, asking, on_row)


def _write(
    model: LlavaModel,
    tokenizer: Tokenizer,
    architecture: Architecture,
    examples: Sequence[Example],
    asking: Asking,
    on_row: Callable[[Row, int], None],
) -> None:
    """The cache has room for the longest prompt, so they are measured first, without decoding a picture."""

    def length(example: Example) -> int:
        return len(layout(example, tokenizer, architecture, has_pixels=False).tokens) + asking.max_new_tokens

    lengths = [*ahead(length, examples, 2 * NUM_READERS)] if distributed.is_data_source() else []
    _tell_beyond(lengths, architecture)
    max_length = distributed.broadcast_in_replica(max(lengths, default=0))
    places = min(asking.batch_size, len(examples))
    engine = Engine(
        model, tokenizer, max_batch_size=places, max_length=max_length, max_prefill_tokens=asking.max_prefill_tokens
    )
    if not engine.is_main:
        engine.follow()
        return
    ends = end_ids(tokenizer, architecture.conversation)

    def request(example: Example) -> Request:
        sampling = replace(asking.sampling, seed=seed_of(asking.sampling.seed, example.id))
        return Request(
            prompt=layout(example, tokenizer, architecture),
            sampling=sampling,
            max_new_tokens=asking.max_new_tokens,
            end_ids=ends,
            stop=asking.stop,
        )

    coming = zip(examples, ahead(request, examples, places), strict=True)
    running: dict[int, Example] = {}
    texts: dict[int, str] = {}
    counts: dict[int, int] = {}
    while True:
        while len(engine.waiting) < places and (found := next(coming, None)):
            example, asked = found
            id = engine.add(asked)
            running[id], texts[id], counts[id] = example, "", 0
        if engine.is_idle:
            break
        for delta in engine.step():
            texts[delta.id] += delta.text
            counts[delta.id] += len(delta.tokens)
            if delta.finish_reason:
                example, text = running.pop(delta.id), texts.pop(delta.id).strip()
                row = Row(id=example.id, answer=text, finish_reason=delta.finish_reason)
                on_row(row, counts.pop(delta.id))
    engine.close()


def _tell_beyond(lengths: Sequence[int], architecture: Architecture) -> None:
    """Say what the model was not made for; it answers all the same."""
    assert architecture.language is not None
    limit, scaling = architecture.language.max_position_embeddings, architecture.language.rotary_scaling
    beyond = sum(length > limit for length in lengths)
    if beyond and (scaling is None or scaling.rope_type != "dynamic"):
        print(
            f"WARNING: {beyond} of {len(lengths)} prompts are, with the longest answer, longer than the {limit} tokens "
            "that the model was made for: what it writes beyond them is worth little",
            file=sys.stderr,
        )


def _choose(
    model: LlavaModel,
    tokenizer: Tokenizer,
    architecture: Architecture,
    examples: Sequence[Example],
    asking: Asking,
    on_row: Callable[[Row, int], None],
) -> None:
    waiting: deque[tuple[Example, int]] = deque()

    def question(example: Example) -> Question:
        choices = tuple(choice_tokens(choice, tokenizer, architecture) for choice in example.choices)
        return Question(prompt=layout(example, tokenizer, architecture), choices=choices)

    def questions() -> Iterator[Question]:
        for example, asked in zip(examples, ahead(question, examples, asking.batch_size), strict=True):
            waiting.append((example, sum(map(len, asked.choices))))
            yield asked

    def on_chosen(choice: int) -> None:
        example, tokens = waiting.popleft()
        on_row(Row(id=example.id, answer=example.choices[choice], finish_reason="chosen"), tokens)

    choose_options(model, questions(), max_tokens=asking.max_prefill_tokens, on_chosen=on_chosen)


def seed_of(seed: int, id: str) -> int:
    """An example's own seed: its samples do not depend on what else is answered, nor on where a run was resumed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id}".encode()).digest()[:8], "big")


def ahead(function: Callable[[Item], Result], items: Sequence[Item], count: int) -> Iterator[Result]:
    """`function` of each item, in order, computed by threads for so many items ahead of what is asked for."""
    coming = iter(items)
    with ThreadPoolExecutor(NUM_READERS, "reader") as readers:
        waiting: deque[Future[Result]] = deque()
        try:
            while True:
                while len(waiting) <= count and (item := next(coming, None)) is not None:
                    waiting.append(readers.submit(function, item))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
