"""An endless stream of micro batches of one data parallel rank, which goes on exactly where it was saved.

The data of a run is dealt to a fixed number of streams, and micro batch g of the whole run, over all
ranks, comes from stream g modulo that number. So the same global batches follow each other on however
many ranks, with however many workers, and a checkpoint goes on with the very next one on another number
of either.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from torch.utils.data import IterableDataset, get_worker_info

from mmcore.config import DataConfig
from mmcore.data.batch import Batch
from mmcore.data.dataset import Dataset, open_dataset
from mmcore.data.pictures import Pictures
from mmcore.data.stream import Blend, Count, Place, Stream, TooManySkippedError, build_blend
from mmcore.data.task_encoder import Layout, build_layout
from mmcore.data.tokenizer import Tokenizer
from mmcore.data.workers import reading, start_workers, stop_workers
from mmcore.foreign import parse_json

# A run's streams, unless ranks and workers ask for more or the dataset is too small: it can then be
# resumed on as many ranks.
NUM_STREAMS, SAMPLES_PER_STREAM = 8, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What must be the same for a place to mean the same samples."""

    dataset: str
    """Hash of its shards' hashes (or indexes), in order."""
    num_streams: int
    micro_batch_size: int
    seq_length: int
    shuffle_buffer_size: int
    packing_buffer_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Saved:
    """What all ranks saved, joined."""

    fingerprint: dict[str, Any]
    position: int
    """Micro batches of the whole run that were taken."""
    places: dict[int, Place]
    """By stream."""

    @property
    def num_streams(self) -> int:
        return int(self.fingerprint["num_streams"])


def read_states(states: Sequence[bytes]) -> Saved:
    """Join what `Loader.state_dict` gave on every rank, in order.

    Raises:
        ValueError: not such states, or not all of one step.
    """
    try:
        contents = [parse_json(state) for state in states]
        positions = [int(content["position"]) for content in contents]
        sizes = {content["data_parallel_size"] for content in contents}
        places = {
            int(stream): Place.from_json(place) for content in contents for stream, place in content["places"].items()
        }
        saved = Saved({"num_streams": 0, **contents[0]["fingerprint"]}, positions[0], places)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the loader's state cannot be read ({error!r}): resume from another checkpoint") from None
    if sizes != {len(states)} or len(set(positions)) > 1:
        raise ValueError(
            f"the loader's states are not those of all ranks at one step ({len(states)} files of {sorted(sizes)} "
            f"ranks, after {sorted(set(positions))} batches): resume from another checkpoint"
        )
    return saved


@dataclass(frozen=True, slots=True)
class Taken:
    """What a worker hands over: a batch of a stream, or why there are no more."""

    stream: int
    batch: Batch | None
    place: Place | None
    error: str = ""


@dataclass(slots=True, kw_only=True)
class Reader(IterableDataset[Taken]):
    """Reads a rank's streams in turn; of several workers, each has streams of its own."""

    streams: Sequence[int]
    first: int
    """Which turn comes next."""
    places: Mapping[int, Place]
    blend: Blend
    layout: Layout
    settings: dict[str, Any]
    """Of Stream."""

    def __iter__(self) -> Iterator[Taken]:
        worker = get_worker_info()
        skip, step = (worker.id, worker.num_workers) if worker else (0, 1)
        opened: dict[int, Stream] = {}
        for turn in itertools.count(self.first + skip, step):
            number = self.streams[turn % len(self.streams)]
            try:
                if number not in opened:
                    place = self.places.get(number)
                    opened[number] = Stream(number, self.blend, self.layout, place=place, **self.settings)
                batch, place = next(opened[number])
            except TooManySkippedError as error:
                yield Taken(number, None, None, str(error))
                return
            reading("")
            yield Taken(number, batch, place)


class Loader:
    """Iterates over `Batch` for ever."""

    def __init__(
        self,
        blend: Blend,
        layout: Layout,
        fingerprint: Fingerprint,
        settings: dict[str, Any],
        *,
        num_workers: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self.sources = tuple(source.name for source in blend.dataset.sources)
        """Names of what is blended, in the order of `Batch.sources`."""
        self._blend, self._layout, self._fingerprint, self._settings = blend, layout, fingerprint, settings
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._streams = range(data_parallel_rank, fingerprint.num_streams, data_parallel_size)
        # Each stream lives in one worker, and workers take turns: their number must divide that of the streams.
        possible = [count for count in range(1, num_workers + 1) if len(self._streams) % count == 0]
        self.num_workers = max(possible, default=0)
        self._places: dict[int, Place] = {}
        self._position = 0  # micro batches of the whole run that were taken, by all ranks as many
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Batch]:
        reader = Reader(
            streams=self._streams,
            first=-(-(self._position - self._rank) // self._size),
            places=dict(self._places),
            blend=self._blend,
            layout=self._layout,
            settings=self._settings,
        )
        self.close()
        self._iterator = start_workers(reader, self.num_workers)
        for taken in self._iterator:
            if taken.error:
                raise TooManySkippedError(taken.error)
            self._places[taken.stream] = taken.place
            self._position += self._size
            yield taken.batch

    def counts(self) -> dict[str, Count]:
        """Of each source, what this rank's streams have counted, in the runs before too."""
        totals = {name: Count() for name in self.sources}
        for place in self._places.values():
            for total, count in zip(totals.values(), place.counts, strict=True):
                for field in fields(Count):
                    setattr(total, field.name, getattr(total, field.name) + getattr(count, field.name))
        return totals

    @property
    def skipped(self) -> int:
        """Samples left out so far: broken, or not to be laid out."""
        return sum(count.skipped for count in self.counts().values())

    @property
    def cut(self) -> int:
        """Samples so far that were longer than seq_length."""
        return sum(count.cut for count in self.counts().values())

    def state_dict(self) -> bytes:
        """Where this rank's streams stand, after the last batch that was taken from it."""
        content = {
            "fingerprint": asdict(self._fingerprint),
            "data_parallel_size": self._size,
            "position": self._position,
            "places": {str(stream): asdict(place) for stream, place in self._places.items()},
        }
        return json.dumps(content).encode()

    def load_state_dict(self, states: Sequence[bytes]) -> None:
        """Go on where all ranks saved; before the first batch is taken.

        Args:
            states: of every rank, in order; their number need not be that of the ranks now.
        Raises:
            ValueError: not such states, or of another dataset, number of streams, batch size, sequence
                length, buffer or seed (both values are named).
        """
        saved = read_states(states)
        differing = [
            f"{name} was {saved.fingerprint.get(name)!r} and is {value!r}"
            for name, value in asdict(self._fingerprint).items()
            if saved.fingerprint.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the data cannot go on where the checkpoint stopped: {'; '.join(differing)}. "
                "Resume with the same values, or start a new run from the checkpoint's weights"
            )
        self._position = saved.position
        self._places = {stream: place for stream, place in saved.places.items() if stream in self._streams}

    def close(self) -> None:
        """Stop the workers."""
        if self._iterator is not None and self.num_workers:
            stop_workers(self._iterator)
        self._iterator = None

    __del__ = close


def build_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    conversation: str,
    pictures: Pictures,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    seed: int,
    states: Sequence[bytes] = (),
    split: str = "train",
    loss_weighting: Literal["tokens", "sqrt_turn"] = "tokens",
) -> Loader:
    """Open a split of a dataset. The order of its samples depends on the seed and the streams alone.

    Args:
        conversation: template, a name in mmcore.data.templates.TEMPLATES.
        pictures: what the model makes of them.
        micro_batch_size: rows of a batch; without packing, samples.
        states: what `state_dict` gave on each rank, in order, to go on from there; the beginning if left out.
        loss_weighting: see mmcore.config.TrainConfig.
    Raises:
        ValueError: no dataset, too few samples for so many ranks and workers, streams that cannot be dealt
            to the ranks, unknown template, the tokenizer can make image_token_id of text, a
            picture does not fit into seq_length, or see `Loader.load_state_dict`.
    """
    pictures = replace(pictures, resize=config.image_resize)
    layout = build_layout(tokenizer, conversation, pictures, config.seq_length)
    layout = replace(layout, loss_weighting=loss_weighting)
    dataset = open_dataset(config.path, split)
    wanted = config.num_streams or (read_states(states).num_streams if states else 0)
    num_streams = _num_streams(wanted, config, dataset, data_parallel_size, is_train=split == "train")
    fingerprint = Fingerprint(
        dataset=dataset.digest,
        num_streams=num_streams,
        micro_batch_size=micro_batch_size,
        seq_length=config.seq_length,
        shuffle_buffer_size=config.shuffle_buffer_size,
        packing_buffer_size=config.packing_buffer_size,
        seed=seed,
    )
    settings = {
        "micro_batch_size": micro_batch_size,
        "packing_buffer_size": config.packing_buffer_size,
        "max_skipped": config.max_skipped,
    }
    loader = Loader(
        build_blend(dataset, num_streams=num_streams, window=config.shuffle_buffer_size, seed=seed),
        layout,
        fingerprint,
        settings,
        num_workers=config.num_workers,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    if states:
        loader.load_state_dict(states)
    return loader


def _num_streams(
    wanted: int, config: DataConfig, dataset: Dataset, data_parallel_size: int, *, is_train: bool = True
) -> int:
    """Streams of a run, checked; of what is no training data the same for any workers and for up to 8 replicas."""
    readers = data_parallel_size * max(1, config.num_workers)
    epoch = [int((source.repetitions or 1) * len(source)) for source in dataset.sources]
    num_samples = min(epoch) if dataset.by_weight else sum(epoch)
    chosen = wanted or readers
    if not wanted and not is_train and num_samples >= (fixed := math.lcm(NUM_STREAMS, data_parallel_size)):
        return fixed
    while not wanted and chosen < NUM_STREAMS and num_samples >= 2 * chosen * SAMPLES_PER_STREAM:
        chosen *= 2
    if chosen % data_parallel_size:
        possible = ", ".join(str(size) for size in range(1, chosen + 1) if chosen % size == 0)
        raise ValueError(
            f"the data of this run is dealt to {chosen} streams, which {data_parallel_size} data parallel ranks cannot "
            f"share evenly: start {possible} of them, or a new run with another --data.num-streams"
        )
    if num_samples < chosen:
        raise ValueError(
            f"{config.path} has {num_samples} samples for {chosen} streams ({data_parallel_size} data parallel ranks, "
            f"{config.num_workers} workers each): lower --data.num-workers or --data.num-streams, or start fewer ranks"
        )
    return chosen
