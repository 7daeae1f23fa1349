"""Samples made up: pixels and tokens of a recipe's shapes, to time training without data.

A sample is one picture and a text whose length is drawn from a log-normal distribution, as lengths of captions and
conversations are: after most of them short, few long. Its mean is that of the benchmarks here: 64 tokens for a caption
(the template "plain"), of which all are trained, 512 for a conversation, of which the last two thirds are. Pictures are
noise of usual sizes, which go through the real layout into tiles.

Micro batch g of a run is a function of the seed and g alone, as with `mmcore.data.loader.Loader`.
"""

import io
import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from mmcore.config import DataConfig
from mmcore.data.batch import Batch, EncodedSample, collate
from mmcore.data.packing import pack
from mmcore.data.pictures import Pictures
from mmcore.data.stream import Count
from mmcore.data.tokenizer import Tokenizer

# Width and height in pixels: COCO's most frequent, a small one, a large one.
SIZES = ((640, 480), (480, 640), (500, 375), (336, 336), (1024, 768))
MEAN_TEXT = {True: 64, False: 512}  # of captions, of conversations
SPREAD = 0.6  # standard deviation of the logarithm of a length
TRAINED = 2 / 3  # of a conversation's text


class SyntheticLoader:
    """Iterates over `Batch` for ever, as `mmcore.data.loader.Loader` does."""

    sources = ("synthetic",)
    num_workers = 0
    skipped = cut = 0

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        conversation: str,
        pictures: Pictures,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        states: Sequence[bytes] = (),
    ) -> None:
        """
        Args:
            tokenizer: for the tags of tiles, where a model has them.
            vocab_size: texts are of tokens below it.
            conversation: template, of which only "plain" or not counts here.
            pictures: what the model makes of them.
            micro_batch_size: rows of a batch; without packing, samples.
            states: what `state_dict` gave on each rank, in order, to go on from there.
        Raises:
            ValueError: a picture does not fit into seq_length, or the states are others.
        """
        self.config, self.vocab_size, self.is_caption = config, vocab_size, conversation == "plain"
        self.micro_batch_size, self.seed = micro_batch_size, seed
        self._rank, self._size, self._turn, self._samples = data_parallel_rank, data_parallel_size, 0, 0
        files = [_noise(*size) for size in SIZES]
        self.pool = [(np.asarray(pictures.ids(file, tokenizer), np.int64), pictures.encode([file])) for file in files]  # type: ignore[arg-type]
        if (longest := max(len(ids) for ids, _ in self.pool)) + 1 >= config.seq_length:
            raise ValueError(
                f"--data.seq-length {config.seq_length} has no room for a picture ({longest} tokens) and text: raise it"
            )
        if states:
            self._go_on(states)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self.batch(self._turn * self._size + self._rank)
            self._turn += 1
            self._samples += len(batch.keys)
            yield batch

    def batch(self, number: int) -> Batch:
        """Micro batch `number` of the whole run."""
        draw = np.random.default_rng((self.seed, number))
        rows = self._rows(draw)
        names = (f"{number}.{index}" for index in itertools.count())
        return collate([self._sample(next(names), draw, *shape) for row in rows for shape in row])

    def _rows(self, draw: np.random.Generator) -> Sequence[Sequence[tuple[int, int]]]:
        """Picture and length of the text of each sample of each row."""
        if not self.config.packing_buffer_size:
            return [[self._shape(draw)] for _ in range(self.micro_batch_size)]
        shapes: list[tuple[int, int]] = []
        # Four times what is needed, of which the rows that are filled best are taken.
        while sum(self._length(shape) for shape in shapes) < 4 * self.micro_batch_size * self.config.seq_length:
            shapes.append(self._shape(draw))
        lengths = [self._length(shape) for shape in shapes]
        rows = pack(lengths, self.config.seq_length)
        rows.sort(key=lambda row: -sum(lengths[index] for index in row))
        return [[shapes[index] for index in row] for row in rows[: self.micro_batch_size]]

    def _shape(self, draw: np.random.Generator) -> tuple[int, int]:
        picture = int(draw.integers(len(self.pool)))
        mean = MEAN_TEXT[self.is_caption]
        text = int(draw.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD))
        return picture, min(max(text, 2), self.config.seq_length - len(self.pool[picture][0]))

    def _length(self, shape: tuple[int, int]) -> int:
        return len(self.pool[shape[0]][0]) + shape[1]

    def _sample(self, key: str, draw: np.random.Generator, picture: int, text: int) -> EncodedSample:
        ids, encoded = self.pool[picture]
        tokens = np.concatenate([ids, draw.integers(0, self.vocab_size, text)])
        labels = np.append(tokens[1:], draw.integers(0, self.vocab_size))
        trained = text if self.is_caption else max(1, int(text * TRAINED))
        loss_mask = np.zeros(len(tokens), np.float32)
        loss_mask[-trained:] = 1
        return EncodedSample(
            key=key,
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(np.where(loss_mask > 0, labels, 0)),
            loss_mask=torch.from_numpy(loss_mask),
            images=encoded.images,
            image_sources=encoded.sources,
            num_features=encoded.num_features,
        )

    def counts(self) -> dict[str, Count]:
        """What this rank has made."""
        return {"synthetic": Count(samples=self._samples)}

    def state_dict(self) -> bytes:
        return json.dumps({"turn": self._turn, "samples": self._samples}).encode()

    def _go_on(self, states: Sequence[bytes]) -> None:
        try:
            contents = [json.loads(state) for state in states]
            position = sum(content["turn"] for content in contents)
            self._samples = sum(content["samples"] for content in contents) if self._rank == 0 else 0
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the loader's state is not of --data.synthetic ({error!r})") from None
        self._turn = -(-(position - self._rank) // self._size)

    def close(self) -> None: ...


def _noise(width: int, height: int) -> bytes:
    """A JPEG."""
    pixels = np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=50)
    return file.getvalue()
