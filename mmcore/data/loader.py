"""An endless stream of micro batches of one data parallel rank, which goes on exactly where it was saved."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.energon import WorkerConfig, get_savable_loader
from megatron.energon.errors import reraise_exception
from megatron.energon.savable_loader import SavableDatasetCheckpoint
from megatron.energon.wrappers.base import BaseWrapperDataset

from mmcore.config import DataConfig
from mmcore.data.batch import Batch
from mmcore.data.conversation import encode_prompt
from mmcore.data.dataset import hash_dataset, open_dataset
from mmcore.data.loader_state import from_json, to_json
from mmcore.data.task_encoder import Layout, TaskEncoder
from mmcore.data.tokenizer import Tokenizer

# More skipped samples than this fraction stop the run, but never so few that they may be chance.
MAX_SKIPPED, FEW_SKIPPED = 0.01, 10

# With workers, resuming reads again what was read since the last of these.
STATE_INTERVAL = 5.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What must be the same for a state to mean the same samples."""

    dataset: str
    """Hash of its shards' hashes (or indexes), in order."""
    data_parallel_rank: int
    data_parallel_size: int
    num_workers: int
    micro_batch_size: int
    shuffle_buffer_size: int
    packing_buffer_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What a worker has counted up to and with a batch."""

    samples: int = 0
    skipped: int = 0
    cut: int = 0


class Tallied(BaseWrapperDataset):
    """Sends a worker's tally along with each batch, and has it saved and restored with the worker.

    A counter shared by processes would also hold what was read ahead, and count again what is read
    again on resuming.
    """

    _savable_fields = ("_samples", "_skipped", "_cut")

    def __init__(self, dataset: Any, encoder: TaskEncoder, worker_config: WorkerConfig) -> None:
        super().__init__(dataset, worker_config=worker_config)
        self._encoder = encoder
        self.reset_state_own()

    def __iter__(self) -> Iterator[tuple[int, Tally, Batch]]:
        for batch in self.dataset:
            self._samples += len(batch.keys)
            tally = Tally(self._samples, self._skipped, self._cut)
            yield self.worker_config.rank_worker_id(), tally, batch

    @property
    def _skipped(self) -> int:
        return self._encoder.skipped

    @_skipped.setter
    def _skipped(self, value: int) -> None:
        self._encoder.skipped = value

    @property
    def _cut(self) -> int:
        return self._encoder.cut

    @_cut.setter
    def _cut(self, value: int) -> None:
        self._encoder.cut = value

    def reset_state_own(self) -> None:
        self._samples = self._skipped = self._cut = 0

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def config(self) -> dict[str, Any]:
        return self.dataset.config()


class Loader:
    """Iterates over `Batch` for ever."""

    def __init__(self, loader: Any, fingerprint: Fingerprint) -> None:
        self._loader = loader
        self._fingerprint = fingerprint
        self._tallies = [Tally()] * max(1, fingerprint.num_workers)

    def __iter__(self) -> Iterator[Batch]:
        for worker, tally, batch in self._loader:
            self._tallies[worker] = tally
            self._check_skipped()
            yield batch

    @property
    def skipped(self) -> int:
        """Samples left out so far, of all workers and of the runs before: broken, or not to be laid out."""
        return sum(tally.skipped for tally in self._tallies)

    @property
    def cut(self) -> int:
        """Samples so far that were longer than seq_length."""
        return sum(tally.cut for tally in self._tallies)

    def state_dict(self) -> bytes:
        """Where the stream stands, after the last batch that was taken from it."""
        state = self._loader.save_state_rank()
        for worker in state.worker_states if state else []:
            if isinstance(worker, SavableDatasetCheckpoint) and worker.state is not None:
                # Of torch's, numpy's and Python's global generators, which nothing here draws from.
                worker.state.rng = None
        content = {
            "fingerprint": asdict(self._fingerprint),
            "tallies": [asdict(tally) for tally in self._tallies],
            "state": to_json(state),
        }
        return json.dumps(content).encode()

    def load_state_dict(self, state: bytes) -> None:
        """Go on where `state` was saved; before the first batch is taken.

        Raises:
            ValueError: not a state, or of another dataset, layout of ranks and workers, batch size,
                shuffle buffer or seed (both values are named).
        """
        try:
            content = json.loads(state)
            saved, inner = content["fingerprint"], from_json(content["state"])
            tallies = [Tally(**tally) for tally in content["tallies"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the loader's state cannot be read ({error}): resume from another checkpoint") from None
        differing = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in asdict(self._fingerprint).items()
            if saved.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the data cannot go on where the checkpoint stopped: {'; '.join(differing)}. "
                "Resume with the same values, or start a new run from the checkpoint's weights"
            )
        self._loader.restore_state_rank(inner)
        self._tallies = tallies

    def close(self) -> None:
        """Stop the workers."""
        iterator = self._loader._iterator
        if iterator is not None and self._fingerprint.num_workers:
            iterator._shutdown_workers()

    # energon's loader refers to itself, and garbage collection takes its queues apart before its workers
    # are told to stop: each would be waited for in vain, 5 seconds.
    __del__ = close

    def _check_skipped(self) -> None:
        samples = sum(tally.samples for tally in self._tallies)
        if self.skipped > max(FEW_SKIPPED, MAX_SKIPPED * (samples + self.skipped)):
            raise RuntimeError(
                f"{self.skipped} of {samples + self.skipped} samples had to be skipped, more than {MAX_SKIPPED:.0%}: "
                "the lines above say why; mend or prepare the dataset again"
            )


def build_train_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    conversation: str,
    num_image_embeddings: int,
    image_token_id: int,
    image_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    seed: int,
) -> Loader:
    """Open the train split of a dataset. The order of its samples depends on the seed alone.

    Args:
        conversation: template, a name in mmcore.data.templates.TEMPLATES.
        num_image_embeddings: places of one picture in a sequence.
        image_token_id: what stands there.
        image_size: height and width of the pixels.
        micro_batch_size: samples of a batch.
    Raises:
        ValueError: no dataset, too few samples for so many ranks and workers, unknown template, the
            tokenizer can make image_token_id of text, or no picture fits into seq_length.
    """
    if image_token_id < tokenizer.vocab_size and image_token_id not in tokenizer.control.values():
        raise ValueError(
            f"image_token_id {image_token_id} is a token of {tokenizer.path}, which has {tokenizer.vocab_size}: it "
            "must lie beyond them or be a control token; convert the model again with this tokenizer"
        )
    if num_image_embeddings >= config.seq_length:
        raise ValueError(
            f"--data.seq-length {config.seq_length} has no room for a picture ({num_image_embeddings} tokens) and text"
        )
    sizes = {"num_image_embeddings": num_image_embeddings, "image_token_id": image_token_id}
    encode_prompt("", tokenizer, conversation, num_images=1, **sizes)  # raises if they do not go together
    layout = Layout(
        tokenizer=tokenizer,
        conversation=conversation,
        image_size=image_size,
        seq_length=config.seq_length,
        **sizes,
    )
    workers = WorkerConfig(
        rank=data_parallel_rank,
        world_size=data_parallel_size,
        num_workers=config.num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,  # the encoder skips what may be skipped itself; the rest is a bug
    )
    found = open_dataset(Path(config.path), workers)
    num_samples = sum(len(part.dataset) for part in found.datasets)
    num_readers = data_parallel_size * max(1, config.num_workers)
    if num_samples < num_readers:
        raise ValueError(
            f"{config.path} has {num_samples} samples for {num_readers} readers ({data_parallel_size} data parallel "
            f"ranks x {max(1, config.num_workers)} workers): lower --data.num-workers, or start fewer ranks"
        )
    encoder = TaskEncoder(layout)
    dataset = encoder.build_train_datasets(
        datasets=found.datasets,
        worker_config=workers,
        batch_size=micro_batch_size,
        # A buffer above one epoch would only mix epochs.
        shuffle_buffer_size=min(config.shuffle_buffer_size, num_samples // num_readers),
        packing_buffer_size=config.packing_buffer_size or None,
        blend_mode=found.blend_mode,
    )
    dataset = Tallied(dataset, encoder, workers)
    # Its watchdog prints all threads' variables after a slow batch and then stops watching.
    loader = get_savable_loader(dataset, checkpoint_every_sec=STATE_INTERVAL, watchdog_timeout_seconds=None)
    loader.pin_memory = False  # energon has it always on; it would not pin a Batch, and warns without a GPU
    fingerprint = Fingerprint(
        dataset=hash_dataset(found),
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        num_workers=config.num_workers,
        micro_batch_size=micro_batch_size,
        shuffle_buffer_size=config.shuffle_buffer_size,
        packing_buffer_size=config.packing_buffer_size,
        seed=seed,
    )
    return Loader(loader, fingerprint)
