"""A sample of a shard to tensors: what energon runs in its workers.

Randomness, when it comes, is to be drawn from `random.Random(f"{seed}|{key}|{self.current_sample_index}")`:
energon's own `restore_seeds` costs 0.4 ms a sample and repeats itself over loaders of one process.
"""

import json
import sys
from dataclasses import dataclass

import torch
from megatron.energon import Cooker, DefaultTaskEncoder, Sample, SkipSample, basic_sample_keys, edataclass, stateless

from mmcore.data.batch import Batch, EncodedSample, collate
from mmcore.data.conversation import encode_conversation, read_turns
from mmcore.data.image import EXTENSIONS, decode_image, preprocess
from mmcore.data.tokenizer import Tokenizer

PICTURES = tuple(dict.fromkeys(EXTENSIONS.values()))

# So many broken samples one after the other are no accident: without this, a dataset of nothing else
# would be read for ever.
MAX_SKIPPED_IN_A_ROW = 100


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
    num_image_embeddings: int
    image_token_id: int
    image_size: int
    seq_length: int


@stateless
def cook(sample: dict) -> RawSample:
    keys = basic_sample_keys(sample)
    return RawSample(**keys, parts={name: data for name, data in sample.items() if not name.startswith("__")})


def encode_sample(key: str, parts: dict[str, bytes], layout: Layout) -> tuple[EncodedSample, bool]:
    """Tensors of one sample, and whether its sequence was cut.

    Raises:
        ValueError: a part is missing or broken, the parts do not belong together, or the sequence
            cannot be trained on.
    """
    if "json" not in parts:
        raise ValueError(f"no json beside {', '.join(parts)}")
    content = json.loads(parts["json"])
    conversation = encode_conversation(
        read_turns(content.get("conversations") if isinstance(content, dict) else None),
        layout.tokenizer,
        layout.conversation,
        num_image_embeddings=layout.num_image_embeddings,
        image_token_id=layout.image_token_id,
        seq_length=layout.seq_length,
    )
    pictures = [parts[extension] for extension in PICTURES if extension in parts]
    images = [preprocess(decode_image(data), layout.image_size) for data in pictures]
    if conversation.num_images != len(images):
        raise ValueError(f"{conversation.num_images} places for {len(images)} pictures")
    empty = torch.empty(0, 3, layout.image_size, layout.image_size, dtype=torch.uint8)
    sample = EncodedSample(
        key=key,
        tokens=torch.tensor(conversation.tokens),
        labels=torch.tensor(conversation.labels),
        loss_mask=torch.tensor(conversation.loss_mask),
        images=torch.stack(images) if images else empty,
    )
    return sample, conversation.was_cut


class TaskEncoder(DefaultTaskEncoder):
    """energon's hooks around `encode_sample`, with a count of what it could not encode."""

    decoder = None
    cookers = (Cooker(cook),)

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.skipped = 0
        self.cut = 0
        self._skipped_in_a_row = 0

    @stateless
    def encode_sample(self, sample: RawSample) -> EncodedSample:
        try:
            encoded, was_cut = encode_sample(sample.__key__, sample.parts, self.layout)
        except ValueError as error:
            self._count_skipped(sample.__key__, error)
            # The only exception that energon takes without a page of output.
            raise SkipSample from None
        self._skipped_in_a_row = 0
        self.cut += was_cut
        return encoded

    @stateless
    def batch(self, samples: list[EncodedSample]) -> Batch:
        return collate(samples)

    def _count_skipped(self, key: str, error: ValueError) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        print(f"mmcore: sample {key} skipped: {error}", file=sys.stderr, flush=True)
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(f"{MAX_SKIPPED_IN_A_ROW} samples in a row cannot be used, the last is {key}: {error}")
