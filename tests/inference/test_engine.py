"""Requests that come and go at any time get the answers that they would get alone, at every layout."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.config import ParallelConfig
from mmcore.data.tokenizer import Tokenizer
from mmcore.inference.engine import Delta, Engine, Prompt, Request
from mmcore.inference.generator import answering
from mmcore.inference.sampling import Sampling
from tests import ranks, tiny
from tests.inference.test_generator import LAYOUTS, NEW, plain, prompts
from tests.training.test_interleaved import INTERLEAVED

HOT = Sampling(temperature=2.0, top_k=40, top_p=0.95)


def tokenizer() -> Tokenizer:
    """Every token is a letter; 0 is a control token."""
    return Tokenizer(
        path=Path("letters"),
        vocab_size=150,
        bos_id=None,
        eos_id=0,
        control={"</s>": 0},
        encode=lambda text: [ord(letter) - 0x400 for letter in text],
        follow=lambda text: [ord(letter) - 0x400 for letter in text],
        decode_text=lambda ids: "".join(chr(0x400 + id) for id in ids),
    )


def text(ids: list[int]) -> str:
    return tokenizer().decode(ids)


def requests(**options: Any) -> list[Request]:
    """One for each of the ragged prompts."""
    return [Request(**{"prompt": prompt, "max_new_tokens": NEW, "end_ids": (), **options}) for prompt in prompts()]


def run(engine: Engine, asked: list[Request], arrivals: list[int]) -> list[list[Delta]]:
    """Deltas of each request; `arrivals` are the steps that requests come before."""
    told: list[list[Delta]] = [[] for _ in asked]
    indices: dict[int, int] = {}
    step = 0
    while step <= max(arrivals) or not engine.is_idle:
        indices |= {engine.add(request): index for index, request in enumerate(asked) if arrivals[index] == step}
        for delta in engine.step():
            told[indices[delta.id]].append(delta)
        step += 1
    return told


def served(layout: ParallelConfig, asked: list[Request], arrivals: list[int], **limits: int) -> list[list[Delta]]:
    """On all ranks of a layout; nothing on those that follow."""
    model = tiny.build(layout)
    with answering(model):
        engine = Engine(model, tokenizer(), **{"max_batch_size": 3, "max_length": 40, **limits})
        if not engine.is_main:
            engine.follow()
            return []
        told = run(engine, asked, arrivals)
        engine.close()
    return told


def alone(*arguments: Any, **limits: int) -> list[list[Delta]]:
    return ranks.run(lambda: served(ParallelConfig(), *arguments, **limits), ParallelConfig(), 1)[0]


def tokens(told: list[list[Delta]]) -> list[list[int]]:
    return [[token for delta in deltas for token in delta.tokens] for deltas in told]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return ranks.run(plain, ParallelConfig(), 1)[0]


ARRIVALS = [0, 0, 1, 0, 4, 4, 9]


@pytest.mark.parametrize("name", [*LAYOUTS, "interleaved"])
def test_the_plain_answers_at_every_layout(name: str, expected: list[list[int]]) -> None:
    """Seven requests in three places, some of which come later: slots are freed and moved meanwhile."""
    layout, world_size = {**LAYOUTS, "interleaved": (INTERLEAVED, 2)}[name]
    # Of other lengths, so that they end at different steps.
    asked = [replace(request, max_new_tokens=1 + index % NEW) for index, request in enumerate(requests())]
    results = ranks.run(served, layout, world_size, layout, asked, ARRIVALS)
    answered = [result for result in results if result]
    assert len(answered) == (2 if name == "dp2" else 1)
    for told in answered:
        assert tokens(told) == [answer[: 1 + index % NEW] for index, answer in enumerate(expected)]
        for deltas in told:
            assert [delta.finish_reason for delta in deltas] == [""] * (len(deltas) - 1) + ["length"]
            assert "".join(delta.text for delta in deltas) == text([id for delta in deltas for id in delta.tokens])


def test_an_answer_does_not_depend_on_its_neighbours(expected: list[list[int]]) -> None:
    """Whatever comes when, in however many places, and however many prompts share a pass."""

    def found() -> dict[tuple[int, int], list[list[int]]]:
        layout, sizes = ParallelConfig(), [(places, room) for places in (1, 2, 3, 7) for room in (1, 30, 8192)]
        return {
            size: tokens(served(layout, requests(), arrivals(seed), max_batch_size=size[0], max_prefill_tokens=size[1]))
            for seed, size in enumerate(sizes)
        }

    def arrivals(seed: int) -> list[int]:
        return [random.Random(seed).randrange(8) for _ in expected]

    for size, answers in ranks.run(found, ParallelConfig(), 1)[0].items():
        assert answers == expected, size


def sampled(sampling: Sampling = HOT) -> list[Request]:
    return [replace(request, sampling=replace(sampling, seed=seed)) for seed, request in enumerate(requests())]


def test_samples_are_those_of_the_seed_alone(expected: list[list[int]]) -> None:
    first = tokens(alone(sampled(), [0] * 7, max_batch_size=7))
    assert first != expected
    assert tokens(alone(sampled(), ARRIVALS, max_batch_size=2)) == first
    # The same prompt, greedy and of other seeds, beside each other.
    one = sampled()[1]
    others = [replace(one, sampling=replace(HOT, seed=seed)) for seed in (1, 2, 3, 1)]
    found = tokens(alone([*others, replace(one, sampling=Sampling())], [0, 0, 1, 2, 0], max_batch_size=5))
    assert found[0] == found[3] == first[1] and found[4] == expected[1]
    assert len({tuple(answer) for answer in found}) == 4


@pytest.mark.parametrize("name", ["tp2", "pp2", "tp2pp2"])
def test_samples_are_the_same_at_every_layout(name: str) -> None:
    layout, world_size = LAYOUTS[name]
    penalized = sampled(replace(HOT, repetition_penalty=1.5))
    first = tokens(alone(penalized, ARRIVALS))
    assert first != tokens(alone(sampled(), ARRIVALS))
    results = ranks.run(served, layout, world_size, layout, penalized, ARRIVALS)
    assert tokens(results[0]) == first and not any(results[1:])


def test_what_ends_an_answer(expected: list[list[int]]) -> None:
    ends = (expected[0][2], expected[1][1])
    (first, second, *_) = alone(requests(end_ids=ends), [0] * 7)
    cut = [next((place for place, id in enumerate(answer) if id in ends), NEW) for answer in expected]
    assert tokens([first, second]) == [expected[0][: cut[0]], expected[1][: cut[1]]]
    assert first[-1] == Delta(id=first[0].id, finish_reason="stop")

    stop = text(expected[1][2:4])
    (told,) = alone([replace(requests()[1], stop=(stop, "nowhere"))], [0])
    assert tokens([told]) == [expected[1][:4]] and told[-1].finish_reason == "stop"
    assert [delta.text for delta in told] == [*text(expected[1][:2]), "", ""]


def without_placeholder(token: int) -> list[int]:
    model = tiny.build(ParallelConfig())
    model.image_token_id = token
    model.architecture = replace(model.architecture, image_token_id=token)
    with answering(model):
        engine = Engine(model, None, max_batch_size=1, max_length=40)
        prompt = Prompt(tokens=[5, 7, 9], images=torch.empty(0, 3, 16, 16, dtype=torch.uint8))
        return tokens(run(engine, [Request(prompt=prompt, max_new_tokens=NEW, end_ids=())], [0]))[0]


def test_a_placeholder_among_the_tokens_is_never_drawn() -> None:
    """Where a model came with one in its vocabulary, an answer that had it would ask for a picture."""
    (free,) = ranks.run(without_placeholder, ParallelConfig(), 1, tiny.LANGUAGE.vocab_size)
    (kept,) = ranks.run(without_placeholder, ParallelConfig(), 1, free[1])
    assert free[0] == kept[0] != free[1] and free[1] not in kept


def test_what_is_held_back_is_told_in_the_end(expected: list[list[int]]) -> None:
    """The answer's end looks like the beginning of a stop text."""
    stop = text(expected[1][-2:]) + "x"
    for options in ({}, {"end_ids": (expected[1][-1],)}):
        (told,) = alone([replace(requests()[1], stop=(stop,), **options)], [0])
        assert "".join(delta.text for delta in told) == text(tokens([told])[0])
        assert told[-1].finish_reason == ("stop" if options else "length")


def cancelled() -> tuple[list[Delta], dict[int, list[int]], list[int]]:
    engine = Engine(tiny.build(ParallelConfig()).eval(), tokenizer(), max_batch_size=2, max_length=40)
    ids = [engine.add(request) for request in requests()[:4]]
    told = engine.step()
    engine.cancel(ids[0])  # runs
    engine.cancel(ids[3])  # waits
    engine.cancel(99)
    told += engine.step()
    engine.cancel(ids[0])  # has ended
    while not engine.is_idle:
        told += engine.step()
    found = {id: [token for delta in told if delta.id == id for token in delta.tokens] for id in ids}
    return [delta for delta in told if delta.finish_reason == "cancelled"], found, ids


def test_cancelled_requests_leave_the_others_alone(expected: list[list[int]]) -> None:
    told, found, ids = ranks.run(cancelled, ParallelConfig(), 1)[0]
    assert told == [Delta(id=ids[0], finish_reason="cancelled"), Delta(id=ids[3], finish_reason="cancelled")]
    assert [found[id] for id in ids] == [expected[0][:1], expected[1], expected[2], []]


def refused() -> list[str]:
    engine = Engine(tiny.build(ParallelConfig()).eval(), None, max_batch_size=2, max_length=30)
    request = requests()[0]
    empty = Prompt(tokens=[], images=torch.empty(0, 3, 16, 16, dtype=torch.uint8))
    said = []
    for options in (
        {"prompt": empty},
        {"max_new_tokens": 0},
        {"max_new_tokens": 20},
        {"stop": ("",)},
        {"stop": ("x",)},
    ):
        with pytest.raises(ValueError) as error:
            engine.add(replace(request, **options))
        said.append(str(error.value))
    return [*said, str(engine.is_idle)]


def test_requests_that_make_no_sense() -> None:
    empty, none, long, stop, stray, idle = ranks.run(refused, ParallelConfig(), 1)[0]
    assert "nothing to continue" in empty and "must be above 0, and is 0" in none and "empty stop text" in stop
    length = len(prompts()[0].tokens)
    assert f"has {length} tokens" in long and "with 20 of an answer it is longer than the 30" in long
    assert "need a tokenizer" in stray and idle == "True"


def again(layout: ParallelConfig) -> list[list[int]]:
    """An engine that rests between requests."""
    model = tiny.build(layout)
    found = []
    with answering(model):
        engine = Engine(model, tokenizer(), max_batch_size=3, max_length=40)
        for _ in range(2):
            if engine.is_main:
                found += tokens(run(engine, requests()[:4], [0] * 4))
                engine.close()
            else:
                engine.follow()
    return found


def test_the_other_ranks_can_be_called_again(expected: list[list[int]]) -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2)
    assert ranks.run(again, layout, 2, layout)[0] == expected[:4] * 2
