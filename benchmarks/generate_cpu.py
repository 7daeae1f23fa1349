"""What continuous batching gains on a CPU over batches of one length that run until their last answer is done.

`OMP_NUM_THREADS=1 python -m benchmarks.generate_cpu --output generate_cpu.json`

A small LLaVA with random weights answers prompts of ragged lengths (a picture and a question) with answers of ragged
lengths (see `draw`), both ways with the same cache and kernels, and with the same places:

- continuous: a request takes a place as soon as one is free, beside others of any length,
- buckets: prompts of one length are a batch, which runs until its longest answer is done. So mmcore generated before,
  and so does any cache that has all of its rows at one position.

The tokens have to be the same. Then both run in turn, and the medians count.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore import host

host.use_host()

import torch  # noqa: E402

from benchmarks.train_cpu import LANGUAGE, VISION, architecture  # noqa: E402
from mmcore import distributed  # noqa: E402
from mmcore.config import ParallelConfig  # noqa: E402
from mmcore.inference.engine import Engine, Prompt, Request  # noqa: E402
from mmcore.models.architecture import Architecture  # noqa: E402
from mmcore.models.llava import LlavaModel, base_config  # noqa: E402

Tokens = list[list[int]]


def draw(arch: Architecture, count: int, seed: int = 0) -> list[Request]:
    """Requests of one picture: questions of 8 to 300 words, half below 40, answers of 1 to 200, half below 20.

    Questions with options, and of several turns, are long; a choice or a word is a short answer, a description a long
    one.
    """
    assert arch.vision is not None and arch.image_token_id is not None
    lengths, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    side, requests = arch.vision.image_size, []
    for _ in range(count):
        question = min(300, max(8, int(40 * lengths.lognormvariate(0, 0.8))))
        answer = min(200, max(1, int(20 * lengths.lognormvariate(0, 1.0))))
        ids = torch.randint(0, arch.image_token_id, (question,), generator=numbers).tolist()
        picture = [arch.image_token_id] * arch.vision.num_image_embeddings
        pixels = torch.randint(0, 256, (1, 3, side, side), generator=numbers, dtype=torch.uint8)
        prompt = Prompt(tokens=[ids[0], *picture, *ids[1:]], images=pixels)
        requests.append(Request(prompt=prompt, max_new_tokens=answer, end_ids=()))
    return requests


def buckets(requests: Sequence[Request], places: int) -> list[list[int]]:
    """Batches of one length, of at most so many: places in `requests`."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        by_length[len(request.prompt.tokens)].append(index)
    return [found[first : first + places] for found in by_length.values() for first in range(0, len(found), places)]


def answered(engine: Engine, requests: Sequence[Request]) -> Tokens:
    """All at once to the engine, until it is idle."""
    answers: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    while not engine.is_idle:
        for delta in engine.step():
            answers[delta.id] += delta.tokens
    return list(answers.values())


def answered_in_buckets(engine: Engine, requests: Sequence[Request], places: int) -> Tokens:
    """Batch by batch; a row that is done is computed on until all of its batch are."""
    answers: dict[int, list[int]] = {}
    for batch in buckets(requests, places):
        longest = max(requests[index].max_new_tokens for index in batch)
        found = answered(engine, [replace(requests[index], max_new_tokens=longest) for index in batch])
        answers |= {index: tokens[: requests[index].max_new_tokens] for index, tokens in zip(batch, found, strict=True)}
    return [answers[index] for index in range(len(requests))]


def measure(arch: Architecture, count: int, places: int, rounds: int) -> dict[str, Any]:
    """Both ways in turn.

    Raises:
        RuntimeError: their tokens differ.
    """
    model = LlavaModel(arch, "local", **base_config(ParallelConfig())).eval()
    requests = draw(arch, count)
    longest = max(len(request.prompt.tokens) for request in requests) + max(r.max_new_tokens for r in requests)
    engine = Engine(model, None, max_batch_size=places, max_length=longest)
    ways = {
        "continuous": lambda: answered(engine, requests),
        "buckets": lambda: answered_in_buckets(engine, requests, places),
    }
    first, second = (way() for way in ways.values())
    if first != second:
        different = sum(one != other for one, other in zip(first, second, strict=True))
        raise RuntimeError(f"{different} of {count} answers are not the same")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    num_tokens = sum(map(len, first))
    return {
        "requests": count,
        "places": places,
        "new_tokens": num_tokens,
        "prompt_tokens": sum(len(request.prompt.tokens) for request in requests),
        "batches_of_one_length": len(buckets(requests, places)),
        "new_tokens_per_second": {name: num_tokens / statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(seconds["buckets"]) / statistics.median(seconds["continuous"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    distributed.initialize(ParallelConfig(), seed=0)
    result = measure(architecture(VISION, LANGUAGE), options.requests, options.places, options.rounds)
    distributed.shutdown()
    result |= {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    result |= {"torch": torch.__version__, "cores": os.cpu_count()}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
