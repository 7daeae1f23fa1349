"""What is in a dataset, and what of it would hurt a run: every sample laid out and decoded as training does it.

Samples are looked at in stretches, by several processes, and what each finds adds up in the samples'
order: the result does not depend on how many there are. Of every sample and every picture 12 bytes are
kept, by which repeated ones are found, and while they are compared 29 more: 53 GB at a billion samples
of one picture. Nothing else grows with the dataset.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmcore.constants import IMAGE_TAG
from mmcore.data.conversation import EncodedConversation
from mmcore.data.dataset import Dataset, RawSample, Source, open_dataset
from mmcore.data.image import picture_size
from mmcore.data.pictures import Pictures
from mmcore.data.sources.workers import map_in_order
from mmcore.data.tally import Example, Prints, Tally
from mmcore.data.task_encoder import Layout, build_layout, lay_out, picture_files
from mmcore.data.tokenizer import load_tokenizer
from mmcore.foreign import parse_json

# Samples that a process looks at before it reports.
STRETCH = 8

# A picture that is enlarged more than so many times is a notice.
MAX_ENLARGED = 2

UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is looked at, and as what kind of run would see it. Travels to other processes."""

    path: str
    split: str
    tokenizer: Path
    """Folder."""
    conversation: str
    pictures: Pictures
    seq_length: int
    vocab_size: int
    """Rows of the model's embedding table."""
    num_samples: int
    """How many are looked at, evenly spread over the dataset."""
    decode: bool
    """Whether every picture is decoded, or only its header read."""
    wanted: frozenset[str] = frozenset()
    """Keys of samples to be found."""


class Opened(NamedTuple):
    """What a plan names."""

    dataset: Dataset
    layout: Layout


@functools.lru_cache(1)
def open_plan(plan: Plan) -> Opened:
    """Dataset and layout of a plan, in whichever process asks.

    Raises:
        ValueError: they cannot be opened, or a run refuses them together.
    """
    layout = build_layout(load_tokenizer(plan.tokenizer), plan.conversation, plan.pictures, plan.seq_length)
    return Opened(open_dataset(plan.path, plan.split), layout)


def unlimited(layout: Layout) -> Layout:
    """The layout without an end."""
    return replace(layout, seq_length=UNLIMITED)


def inspect(
    plan: Plan, *, workers: int = 1, on_progress: Callable[[int], None] = lambda num_samples: None
) -> list[Tally]:
    """Look at a plan's samples.

    Args:
        workers: processes.
        on_progress: told how many more samples are done.
    Returns:
        What was counted, by source.
    Raises:
        ValueError: the plan's files cannot be opened.
    """
    tallies = [Tally() for _ in open_plan(plan).dataset.sources]
    starts = range(0, plan.num_samples, STRETCH)
    for start, found in zip(starts, map_in_order(Look(plan, STRETCH), starts, workers), strict=True):
        for number, tally in found.items():
            tallies[number].add(tally)
        on_progress(min(STRETCH, plan.num_samples - start))
    _find_repeated(plan, tallies)
    return tallies


@dataclass(frozen=True, slots=True)
class Look:
    """Looks at a stretch of samples, in whichever process it is."""

    plan: Plan
    num_samples: int

    def __call__(self, start: int) -> dict[int, Tally]:
        """What is counted from sample `start` on, by source."""
        tallies: dict[int, Tally] = {}
        for number in range(start, min(start + self.num_samples, self.plan.num_samples)):
            source, index = locate(self.plan, number)
            look_at(number, source, index, self.plan, tallies.setdefault(source.number, Tally()))
        return tallies


def locate(plan: Plan, number: int) -> tuple[Source, int]:
    """Source, and place in it, of one of the samples that are looked at."""
    sources = open_plan(plan).dataset.sources
    place = number * sum(map(len, sources)) // plan.num_samples
    for source in sources:
        if place < len(source):
            return source, place
        place -= len(source)
    raise AssertionError(f"sample {number} of {plan.num_samples}")


def look_at(number: int, source: Source, index: int, plan: Plan, tally: Tally) -> None:
    """Count one sample, and what is wrong with it."""
    try:
        raw = source.read(index)
    except ValueError as error:
        tally.counts["samples"] += 1
        return tally.find("unreadable", Example("", "", str(error)))
    if raw is None:
        tally.counts["excluded"] += 1
        return None
    layout, files = open_plan(plan).layout, picture_files(raw.parts)
    tally.counts["samples"] += 1
    tally.pictures[len(files)] += 1
    tally.keys.add(raw.key.encode("utf-8", "surrogateescape"), number)
    for data in files:
        tally.files.add(data, number)
    if raw.key in plan.wanted:
        tally.wanted.setdefault(raw.key, number)
    problem = _broken(files, plan)
    if problem:
        tally.find("broken_picture", Example(raw.shard, raw.key, problem))
    conversation = _lay_out(raw, files, bool(problem), layout, tally)
    if conversation is not None:
        _count_tokens(raw, conversation, plan, tally)
    if conversation is not None and not problem:
        tally.used[len(conversation.tokens)] += 1
        _look_at_sizes(raw, files, layout.pictures, tally)
    return None


def _broken(files: Sequence[bytes], plan: Plan) -> str:
    """What is wrong with the first picture that cannot be used; empty if there is none."""
    try:
        if plan.decode:
            plan.pictures.encode(files)
        for data in files:
            picture_size(data)
    except ValueError as error:
        return str(error)
    return ""


def _lay_out(
    raw: RawSample, files: Sequence[bytes], is_broken: bool, layout: Layout, tally: Tally
) -> EncodedConversation | None:
    """The sequence that training sees; None if it sees none."""
    try:
        whole = lay_out(raw.parts, unlimited(layout))
    except ValueError as error:
        finding = _reason(raw.parts, len(files))
        if not is_broken or finding != "no_layout":  # the broken picture may be all that is wrong
            tally.find(finding, Example(raw.shard, raw.key, str(error)))
        return None
    tally.lengths[len(whole.tokens)] += 1
    tally.counts["text only"] += whole.num_images == 0
    beyond = whole.tokens[layout.seq_length :]
    if not beyond:
        return whole
    tally.counts["tokens beyond the window"] += len(beyond)
    tally.find("longer", Example(raw.shard, raw.key, f"{len(whole.tokens)} tokens"))
    if layout.pictures.image_token_id in beyond:
        length = f"the sequence has {len(whole.tokens)} tokens"
        tally.find(
            "cut_picture", Example(raw.shard, raw.key, f"a picture lies beyond token {layout.seq_length}; {length}")
        )
    try:
        return lay_out(raw.parts, layout)
    except ValueError as error:
        if layout.pictures.image_token_id not in beyond:
            tally.find("nothing_trained", Example(raw.shard, raw.key, str(error)))
        return None


def _reason(parts: dict[str, bytes], num_pictures: int) -> str:
    """Which finding it is that a sample cannot be laid out, whatever its length."""
    try:
        content = parse_json(parts["json"])
        is_document = isinstance(content.get("text"), str)
        turns = [{"from": "gpt", "value": content["text"]}] if is_document else content["conversations"]
        num_tags = sum(turn["value"].count(IMAGE_TAG) for turn in turns)
        answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
    except (AttributeError, KeyError, TypeError, ValueError):
        return "no_layout"
    if num_tags != num_pictures:
        return "missing_picture" if num_tags > num_pictures else "picture_without_place"
    return "no_layout" if any(answer.strip() for answer in answers) else "nothing_trained"


def _count_tokens(raw: RawSample, conversation: EncodedConversation, plan: Plan, tally: Tally) -> None:
    """Count what a sequence is made of, and check its ids."""
    image_token_id = plan.pictures.image_token_id
    tally.counts["tokens"] += len(conversation.tokens)
    tally.counts["tokens of pictures"] += conversation.tokens.count(image_token_id)
    tally.counts["trained tokens"] += int(sum(conversation.loss_mask))
    ids = {*conversation.tokens, *(conversation.labels[-1:] if conversation.loss_mask[-1] else [])} - {image_token_id}
    tally.see(tuple(ids))
    if outside := sorted(id for id in ids if not 0 <= id < plan.vocab_size):
        detail = f"token {outside[0]}, and the model has {plan.vocab_size}"
        tally.find("outside_vocabulary", Example(raw.shard, raw.key, detail))


def _look_at_sizes(raw: RawSample, files: Sequence[bytes], settings: Pictures, tally: Tally) -> None:
    sizes = [picture_size(data) for data in files]
    small = [size for size in sizes if min(size) * MAX_ENLARGED < settings.image_size]
    if small:
        width, height = small[0]
        tally.find("small_picture", Example(raw.shard, raw.key, f"{width} x {height} pixels"), len(small))


def _find_repeated(plan: Plan, tallies: Sequence[Tally]) -> None:
    """Keys that a source has twice, and pictures that the dataset has twice."""
    for tally in tallies:
        _add_repeated("repeated_key", [tally.keys], [tally], plan)
    _add_repeated("repeated_picture", [tally.files for tally in tallies], tallies, plan)


def _add_repeated(finding: str, prints: Sequence[Prints], tallies: Sequence[Tally], plan: Plan) -> None:
    """Add to each tally how many of its prints stand among those before them."""
    joined = Prints()
    for one in prints:
        joined.extend(one)
    again, firsts = joined.repeated()
    owners = np.searchsorted(np.cumsum([len(one.values) for one in prints]), again, side="right")
    for tally, count in zip(tallies, np.bincount(owners, minlength=len(tallies)), strict=True):
        if count:
            tally.found[finding] += int(count)
    for place, first, owner in zip(again, firsts, owners, strict=False):  # of the first few only
        raw, earlier = (read(plan, joined.owners[index]) for index in (place, first))
        example = Example(raw.shard, raw.key, f"also in sample {earlier.key} of {earlier.shard}")
        tallies[owner].examples.setdefault(finding, []).append(example)


def read(plan: Plan, number: int) -> RawSample:
    """A sample that was read before, once more."""
    source, index = locate(plan, number)
    raw = source.read(index)
    assert raw is not None
    return raw
