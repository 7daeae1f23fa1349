"""Losses of a dataset's samples, each once, at any layout: what `mmcore.evaluation.loss` scores.

Sequences, labels and which tokens count are those of training (`mmcore.data.task_encoder`); samples are packed into
rows as in training, where none sees another, so that a loss does not depend on its neighbours. Of several replicas
each takes a part of the samples.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mmcore import distributed
from mmcore.data.batch import Batch, EncodedSample, collate, with_image_positions
from mmcore.data.dataset import Dataset, open_dataset
from mmcore.data.pictures import Pictures
from mmcore.data.task_encoder import Layout, build_layout, encode_sample, lay_out
from mmcore.data.tokenizer import Tokenizer
from mmcore.evaluation.loss import SampleLoss
from mmcore.inference.engine import from_last_stage, run_stages
from mmcore.inference.generator import answering
from mmcore.models.architecture import Architecture
from mmcore.models.interleaved import InterleavedModel
from mmcore.models.llava import LlavaModel
from mmcore.models.sequence_parallel import packed_segments

# Pictures: later pipeline stages do without.
WITHHELD = ("images",)


class Read(NamedTuple):
    """A sample and its row, which lacks the loss; there is no sample where there is none to compute."""

    row: SampleLoss
    sample: EncodedSample | None


def dataset_losses(
    model: LlavaModel | InterleavedModel,
    architecture: Architecture,
    tokenizer: Tokenizer,
    path: str,
    split: str = "val",
    *,
    max_tokens: int = 8192,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SampleLoss]:
    """Losses of all samples of a split; all ranks call it.

    Args:
        architecture: the model's; its template lays out conversations, and samples are cut to its length.
        path: as of `open_dataset`.
        max_tokens: most tokens of a forward pass, but for a single sample that is longer.
        on_progress: told on a replica's main rank how many of its samples are done, and of how many.
    Returns:
        One row a sample, in the order of the sources and their shards, on every rank; those that cannot be used say
        why. None of what the dataset's metadata leaves out.
    Raises:
        ValueError: as of `open_dataset` and `build_layout`.
    """
    assert architecture.language is not None
    dataset = open_dataset(path, split)
    pictures = Pictures(**architecture.picture_options())
    layout = build_layout(tokenizer, architecture.conversation, pictures, architecture.language.max_position_embeddings)
    places = [(number, index) for number, source in enumerate(dataset.sources) for index in range(len(source))]
    rank, size = distributed.data_parallel_rank(), distributed.data_parallel_size()
    mine = places[len(places) * rank // size : len(places) * (rank + 1) // size]
    rows: list[SampleLoss] = []
    with answering(model):
        if distributed.is_data_source():
            for read, batch in _batches(dataset, layout, mine, max_tokens):
                sums = iter(_sums(model, distributed.broadcast_in_replica(batch, WITHHELD)) if batch else ())
                rows += [replace(one.row, loss_sum=next(sums)) if one.sample else one.row for one in read]
                on_progress(len(rows), len(mine))
            distributed.broadcast_in_replica(None, WITHHELD)
        else:
            while (batch := distributed.broadcast_in_replica(None, WITHHELD)) is not None:
                _sums(model, batch)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


def _batches(
    dataset: Dataset, layout: Layout, places: Sequence[tuple[int, int]], max_tokens: int
) -> Iterator[tuple[list[Read], Batch | None]]:
    """Samples in their order, packed; without a batch those of which none has a loss."""
    waiting: list[Read] = []
    room = max_tokens
    for read in _read(dataset, layout, places):
        size = len(read.sample.tokens) if read.sample else 0
        if size > room and room < max_tokens:
            yield waiting, _pack(waiting, layout)
            waiting, room = [], max_tokens
        waiting.append(read)
        room -= size
    if waiting:
        yield waiting, _pack(waiting, layout)


def _pack(read: Sequence[Read], layout: Layout) -> Batch | None:
    samples = [one.sample for one in read if one.sample]
    return with_image_positions(collate(samples), layout.pictures.image_token_id) if samples else None


def _read(dataset: Dataset, layout: Layout, places: Sequence[tuple[int, int]]) -> Iterator[Read]:
    """Samples at their places (source, index); what is broken says why."""
    for number, index in places:
        source = dataset.sources[number]
        name, sample, was_cut = f"{source.name}/{index}", None, False
        try:
            raw = source.read(index)
            if raw is None:  # left out by the metadata
                continue
            name = f"{source.name}/{raw.shard}/{raw.key}"
            conversation = lay_out(raw.parts, layout)
            sample, was_cut = encode_sample(raw.key, raw.parts, conversation, layout), conversation.was_cut
            problem = ""
        except ValueError as error:
            problem = str(error)
            print(f"mmcore: skipped: {name}: {problem}", file=sys.stderr, flush=True)
        num_tokens = len(sample.loss_mask.nonzero()) if sample else 0
        row = SampleLoss(
            id=name, source=source.name, loss_sum=0.0, num_tokens=num_tokens, was_cut=was_cut, problem=problem
        )
        yield Read(row, sample if num_tokens else None)


@torch.no_grad()
def _sums(model: LlavaModel | InterleavedModel, batch: Batch) -> list[float]:
    """The loss of each sample of a batch, on every rank of the replica."""
    packed = packed_segments(batch.cu_seqlens, batch.max_seqlen)
    losses = run_stages(
        model,
        batch.tokens,
        batch.images,
        batch.image_sources,
        image_positions=batch.image_positions,
        labels=batch.labels,
        positions=batch.loss_positions,
        packed_seq_params=packed,
    )  # float32 [t]
    sums = torch.zeros(len(batch.keys), dtype=torch.float64, device=batch.tokens.device)
    if losses is not None:
        sample = torch.searchsorted(batch.cu_seqlens.long(), batch.loss_positions, right=True) - 1  # int64 [t]
        sums.index_add_(0, sample, losses.double())
    from_last_stage(sums)
    found: list[float] = sums.tolist()
    return found
