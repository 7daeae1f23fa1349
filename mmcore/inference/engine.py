"""Continuous batching: requests come and go while others run, on all ranks of one replica of the model.

A step is one forward pass: of a new token of every running request, and of the prompts of those that found a place.
All ranks step together. The replica's main rank alone has the requests: it says before each pass what ended and what
is new, and all ranks get the chosen tokens after it.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcore import distributed, host
from mmcore.data.batch import join_image_sources
from mmcore.data.tokenizer import Tokenizer
from mmcore.inference.draw import choose, penalize
from mmcore.inference.sampling import GREEDY, Sampling
from mmcore.inference.stages import from_last_stage, run_stages
from mmcore.inference.streaming import TextStream
from mmcore.models.cache import KeyValueCache
from mmcore.models.interleaved import InterleavedModel
from mmcore.models.llava import LlavaModel

FinishReason = Literal["", "stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is to be continued, laid out by the data side."""

    tokens: list[int]
    """Placeholders of image embeddings included."""
    images: Tensor  # uint8 [n, 3, h, w]; n is 0 on later pipeline stages
    image_sources: Tensor | None = None  # int64 [e]; feature of `images` that each place takes, -1 the newline


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, how its answer is chosen, and what ends it."""

    prompt: Prompt
    sampling: Sampling = GREEDY
    max_new_tokens: int
    """Longest answer."""
    end_ids: tuple[int, ...]
    """Tokens that end an answer; they are not part of it."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; its text has nothing from the first of them on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a step added to an answer."""

    id: int
    """As `Engine.add` gave it."""
    tokens: tuple[int, ...] = ()
    """New tokens, but for one that ended the answer."""
    text: str = ""
    """Text that is final now: all deltas' together are the answer."""
    finish_reason: FinishReason = ""
    """Empty while the answer goes on; "stop" after an end token or a stop text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Orders:
    """What the main rank tells the others before a pass."""

    freed: tuple[int, ...] = ()
    """Slots of what ended, one after the other: in a freed slot then stands what stood in the last."""
    tokens: tuple[list[int], ...] = ()
    """Prompts of newcomers."""
    samplings: tuple[Sampling, ...] = ()
    images: Tensor | None = None  # uint8 [n, 3, h, w] of all newcomers
    image_sources: Tensor | None = None  # int64 [e]
    is_last: bool = False
    """Whether the others may go."""


class _Row:
    """What every rank knows of a running request."""

    def __init__(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self.prompt, self.sampling, self.random = tokens, sampling, random.Random(sampling.seed)
        self.last = 0  # newest token
        self.seen: Tensor | None = None  # bool [v], where a penalty asks


class _Answer:
    """What the main rank knows of a request."""

    def __init__(self, id: int, request: Request, tokenizer: Tokenizer | None) -> None:
        self.id, self.request, self.count = id, request, 0
        self.text = None if tokenizer is None else TextStream(tokenizer.decode, request.stop)

    def take(self, token: int) -> Delta:
        if token in self.request.end_ids:
            return Delta(id=self.id, text=self.text.finish() if self.text else "", finish_reason="stop")
        self.count += 1
        text = self.text.push(token) if self.text else ""
        reason: FinishReason = ""
        if self.text and self.text.stopped:
            reason = "stop"
        elif self.count == self.request.max_new_tokens:
            text, reason = text + (self.text.finish() if self.text else ""), "length"
        return Delta(id=self.id, tokens=(token,), text=text, finish_reason=reason)


class Engine:
    """Answers requests; all ranks of a replica make one, in evaluation mode and without sequence parallelism.

    The replica's main rank (`is_main`) adds requests and calls `step` again and again, then `close`; the others
    `follow`. Meanwhile they wait for each step, and give up after `distributed.TIMEOUT`: an idle main rank steps too.
    """

    def __init__(
        self,
        model: LlavaModel | InterleavedModel,
        tokenizer: Tokenizer | None,
        *,
        max_batch_size: int,
        max_length: int,
        max_prefill_tokens: int = 8192,
    ) -> None:
        """
        Args:
            tokenizer: what makes text of tokens; without one deltas have none.
            max_batch_size: most requests that run at once; others wait.
            max_length: longest prompt and answer together, in tokens. The cache takes memory for so many in each
                of max_batch_size places.
            max_prefill_tokens: most tokens of prompts in one pass, but for a single prompt that is longer.
        """
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.max_length, self.max_prefill_tokens = max_batch_size, max_length, max_prefill_tokens
        self.is_main = distributed.is_data_source()
        self.image_token_id = model.architecture.image_token_id
        self.cache = KeyValueCache(max_batch_size, max_length)
        self.rows: list[_Row] = []  # by slot, on every rank
        self.running: list[_Answer] = []  # by slot, on the main rank
        self.waiting: deque[_Answer] = deque()
        self.freed: list[int] = []
        self.cancelled: list[int] = []
        self.next_id = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs, and no delta is left to tell."""
        return not (self.waiting or self.running or self.cancelled)

    def add(self, request: Request) -> int:
        """Take a request; the main rank alone calls it.

        Returns:
            Its id.
        Raises:
            ValueError: it has no room, or asks for what there is not.
        """
        assert self.is_main
        length, new = len(request.prompt.tokens), request.max_new_tokens
        if not length:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if new < 1:
            raise ValueError(f"max_new_tokens must be above 0, and is {new}")
        if length + new > self.max_length:
            raise ValueError(
                f"the prompt has {length} tokens, pictures included; with {new} of an answer it is longer than the "
                f"{self.max_length} that there is room for: ask for less, or for a shorter answer"
            )
        if "" in request.stop:
            raise ValueError("an empty stop text ends every answer before it begins")
        if request.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer")
        self.next_id += 1
        self.waiting.append(_Answer(self.next_id, request, self.tokenizer))
        return self.next_id

    def cancel(self, id: int) -> None:
        """End a request; the next step tells so. One that has ended already is left alone."""
        found = next((answer for answer in (*self.waiting, *self.running) if answer.id == id), None)
        if found is None:
            return
        self.cancelled.append(id)
        if found in self.waiting:
            self.waiting.remove(found)
        else:
            self._free(self.running.index(found))

    def step(self) -> list[Delta]:
        """One pass over all that runs; the main rank alone calls it.

        Returns:
            What it added, one delta for each request that ran or was cancelled.
        """
        assert self.is_main
        deltas = [Delta(id=id, finish_reason="cancelled") for id in self.cancelled]
        newcomers = self._admit()
        prompts = [answer.request.prompt for answer in newcomers]
        images, image_sources = self._pictures([prompt for prompt in prompts if len(prompt.images)])
        orders = _Orders(
            freed=tuple(self.freed),
            tokens=tuple(prompt.tokens for prompt in prompts),
            samplings=tuple(answer.request.sampling for answer in newcomers),
            images=images,
            image_sources=image_sources,
        )
        self.cancelled, self.freed = [], []
        self.running += newcomers
        tokens = self._obey(distributed.broadcast_in_replica(orders, ("images", "image_sources")))
        told = [answer.take(token) for answer, token in zip(self.running, tokens, strict=True)]
        # From the last on, so that what moves into a freed slot goes on running.
        for slot in reversed([slot for slot, delta in enumerate(told) if delta.finish_reason]):
            self._free(slot)
        return deltas + told

    def follow(self) -> None:
        """Take part in the steps of the main rank until it closes; the other ranks call it."""
        assert not self.is_main
        while not (orders := distributed.broadcast_in_replica(None, ("images", "image_sources"))).is_last:
            self._obey(orders)

    def close(self) -> None:
        """Let the other ranks go; the main rank calls it."""
        assert self.is_main
        distributed.broadcast_in_replica(_Orders(is_last=True), ("images", "image_sources"))

    def _free(self, slot: int) -> None:
        self.freed.append(slot)
        self.running[slot] = self.running[-1]
        self.running.pop()

    def _admit(self) -> list[_Answer]:
        """Those that wait the longest, as many as there is room for in slots and in the pass."""
        newcomers: list[_Answer] = []
        room = self.max_prefill_tokens
        while self.waiting and len(self.running) + len(newcomers) < self.max_batch_size:
            room -= len(self.waiting[0].request.prompt.tokens)
            if room < 0 and newcomers:
                break
            newcomers.append(self.waiting.popleft())
        return newcomers

    def _pictures(self, prompts: Sequence[Prompt]) -> tuple[Tensor | None, Tensor | None]:
        """Pixels of several prompts, each with some, and their sources as those of all together."""
        if not prompts:
            return None, None
        num_features = [len(prompt.images) * self.model.num_image_embeddings for prompt in prompts]
        sources = join_image_sources([prompt.image_sources for prompt in prompts], num_features)
        return torch.cat([prompt.images for prompt in prompts]), sources

    @torch.no_grad()
    def _obey(self, orders: _Orders) -> list[int]:
        """Run a pass: the new token of every running request, by slot."""
        for slot in orders.freed:
            self.cache.free(slot)
            self.rows[slot] = self.rows[-1]
            self.rows.pop()
        tokens = [row.last for row in self.rows]
        for prompt in orders.tokens:
            tokens += prompt
        self.rows += [_Row(*new) for new in zip(orders.tokens, orders.samplings, strict=True)]
        if not self.rows:
            return []
        self.cache.begin([len(prompt) for prompt in orders.tokens])
        row = torch.tensor([tokens], device=host.device())  # [1, t]
        logits = run_stages(self.model, row, orders.images, orders.image_sources, inference_context=self.cache)
        chosen = torch.empty(len(self.rows), dtype=torch.long, device=row.device)
        if logits is not None:
            chosen = self._choose(logits)
        from_last_stage(chosen)
        for running, token in zip(self.rows, chosen.tolist(), strict=True):
            running.last = token
        return [running.last for running in self.rows]

    def _choose(self, logits: Tensor) -> Tensor:
        """[n, v] -> int64 [n]."""
        logits = logits.float()
        assert self.image_token_id is not None
        if self.image_token_id < logits.shape[1]:
            # Of a model that came with one in its vocabulary: there is no picture to stand in its place.
            logits[:, self.image_token_id] = -torch.inf
        penalized = [slot for slot, row in enumerate(self.rows) if row.sampling.repetition_penalty != 1]
        if penalized:
            slots = torch.tensor(penalized, device=logits.device)
            rows = [self.rows[slot] for slot in penalized]
            seen = torch.stack([_seen(row, logits) for row in rows])
            penalties = torch.tensor([row.sampling.repetition_penalty for row in rows], device=logits.device)
            logits[slots] = penalize(logits[slots], seen, penalties)
        draws = [row.random.random() for row in self.rows]
        return choose(logits, [row.sampling for row in self.rows], draws)


def _seen(row: _Row, logits: Tensor) -> Tensor:
    """Which tokens the prompt and the answer have: bool [v]. A picture's placeholder is no token."""
    vocabulary = logits.shape[1]
    if row.seen is None:
        row.seen = torch.zeros(vocabulary, dtype=torch.bool, device=logits.device)
        ids = [id for id in set(row.prompt) if id < vocabulary]
        row.seen[torch.tensor(ids, dtype=torch.long, device=logits.device)] = True
    else:
        row.seen[row.last] = True
    return row.seen
