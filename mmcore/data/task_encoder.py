"""A sample of a shard to tensors: what energon runs in its workers.

Randomness, when it comes, is to be drawn from `random.Random(f"{seed}|{key}|{self.current_sample_index}")`:
energon's own `restore_seeds` costs 0.4 ms a sample and repeats itself over loaders of one process.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from megatron.energon import Cooker, DefaultTaskEncoder, Sample, SkipSample, basic_sample_keys, edataclass, stateless

from mmcore.data.batch import Batch, EncodedSample, collate
from mmcore.data.conversation import EncodedConversation, encode_conversation, encode_document, read_turns
from mmcore.data.image import EXTENSIONS
from mmcore.data.packing import pack
from mmcore.data.pictures import Pictures
from mmcore.data.tokenizer import Tokenizer

PICTURES = tuple(dict.fromkeys(EXTENSIONS.values()))

# So many broken samples one after the other are no accident: without this, a dataset of nothing else
# would be read for ever.
MAX_SKIPPED_IN_A_ROW = 100

Stage = Literal["text", "pictures"]


@edataclass
class RawSample(Sample):
    """Undecoded, so that the shuffle buffer holds files and not pixels."""

    parts: dict[str, bytes]
    """Content by file extension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All that decides what a sample's tensors are."""

    tokenizer: Tokenizer
    conversation: str
    pictures: Pictures
    seq_length: int


@stateless
def cook(sample: dict) -> RawSample:
    keys = basic_sample_keys(sample)
    return RawSample(**keys, parts={name: data for name, data in sample.items() if not name.startswith("__")})


@dataclass(slots=True, kw_only=True)
class Row:
    """Samples that share a row."""

    samples: list[EncodedSample]
    __restore_key__: tuple[Any, ...] = ()  # energon's


@edataclass
class LaidOutSample(Sample):
    """A sample whose length is known; its pictures are still files."""

    parts: dict[str, bytes]
    conversation: EncodedConversation


def lay_out(parts: dict[str, bytes], layout: Layout) -> EncodedConversation:
    """A sample's sequence; reads no more of a picture than its header, and that only if its size matters.

    Raises:
        ValueError: there is no text, or it cannot be trained on, or it has places for other than the
            sample's pictures, or one of these is none.
    """
    if "json" not in parts:
        raise ValueError(f"no json beside {', '.join(parts)}")
    content = json.loads(parts["json"])
    places: dict[str, Any] = {
        "pictures": [layout.pictures.ids(data, layout.tokenizer) for data in picture_files(parts)],
        "image_token_id": layout.pictures.image_token_id,
        "seq_length": layout.seq_length,
    }
    if isinstance(content, dict) and isinstance(content.get("text"), str):
        return encode_document(content["text"], layout.tokenizer, **places)
    turns = read_turns(content.get("conversations") if isinstance(content, dict) else None)
    return encode_conversation(turns, layout.tokenizer, layout.conversation, **places)


def picture_files(parts: dict[str, bytes]) -> list[bytes]:
    """Files of a sample's pictures in the order of their tags: one is `jpg`, several are `0.jpg`, `1.png`, ..."""
    found = []
    for name, data in parts.items():
        number, _, extension = name.rpartition(".")
        if extension in PICTURES and (not number or number.isdecimal()):
            found.append((int(number or 0), data))
    return [data for _, data in sorted(found, key=lambda picture: picture[0])]


def encode_sample(
    key: str, parts: dict[str, bytes], conversation: EncodedConversation, layout: Layout
) -> EncodedSample:
    """Tensors of a sample that is laid out.

    Raises:
        ValueError: a picture is broken.
    """
    pictures = layout.pictures.encode(picture_files(parts)[: conversation.num_images])
    return EncodedSample(
        key=key,
        tokens=torch.tensor(conversation.tokens),
        labels=torch.tensor(conversation.labels),
        loss_mask=torch.tensor(conversation.loss_mask),
        images=pictures.images,
        image_sources=pictures.sources,
        num_features=pictures.num_features,
    )


class TaskEncoder(DefaultTaskEncoder):
    """energon's hooks, with a count of what could not be encoded.

    Samples are laid out before they are packed, and their pictures decoded after: a packing buffer
    holds files, not pixels.
    """

    decoder = None
    cookers = (Cooker(cook),)

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.skipped = 0
        self.cut = 0
        # A packing buffer lays many samples out before it looks at the first picture.
        self._in_a_row: Counter[Stage] = Counter()

    @stateless
    def preencode_sample(self, sample: RawSample) -> LaidOutSample:
        try:
            conversation = lay_out(sample.parts, self.layout)
        except ValueError as error:
            self._skip("text", sample.__key__, error)
        self._in_a_row["text"] = 0
        return LaidOutSample.derive_from(sample, parts=sample.parts, conversation=conversation)

    @stateless
    def postencode_sample(self, sample: LaidOutSample) -> EncodedSample:
        try:
            encoded = encode_sample(sample.__key__, sample.parts, sample.conversation, self.layout)
        except ValueError as error:
            self._skip("pictures", sample.__key__, error)
        self._in_a_row["pictures"] = 0
        self.cut += sample.conversation.was_cut
        return encoded

    def select_samples_to_pack(self, samples: list[LaidOutSample]) -> list[list[LaidOutSample]]:
        lengths = [len(sample.conversation.tokens) for sample in samples]
        return [[samples[index] for index in row] for row in pack(lengths, self.layout.seq_length)]

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> Row:
        if not samples:  # the pictures of all were broken
            raise SkipSample
        return Row(samples=samples)

    @stateless
    def batch(self, samples: list[EncodedSample] | list[Row]) -> Batch:
        rows = [sample.samples if isinstance(sample, Row) else [sample] for sample in samples]
        return collate([sample for row in rows for sample in row])

    def _skip(self, stage: Stage, key: str, error: ValueError) -> NoReturn:
        self.skipped += 1
        self._in_a_row[stage] += 1
        print(f"mmcore: sample {key} skipped: {error}", file=sys.stderr, flush=True)
        if self._in_a_row[stage] == MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(f"{MAX_SKIPPED_IN_A_ROW} samples in a row cannot be used, the last is {key}: {error}")
        # The only exception that energon takes without a page of output.
        raise SkipSample from None
