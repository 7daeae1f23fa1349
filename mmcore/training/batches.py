"""Where a run's micro batches come from: its dataset, or samples made up."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore import checkpoint as ckpt
from mmcore import distributed
from mmcore.config import RunConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.data.batch import Batch, with_image_positions
from mmcore.data.loader import build_loader
from mmcore.data.pictures import Pictures
from mmcore.data.stream import Count
from mmcore.data.synthetic import SyntheticLoader
from mmcore.data.tokenizer import load_tokenizer
from mmcore.models.architecture import Architecture, checkpoints, newest
from mmcore.training.marks import beat


def check_data(config: RunConfig, architecture: Architecture) -> None:
    """Find what the data lacks for this run, before ranks find each other and a model is built.

    Raises:
        ValueError: as of `build_loader`, on the main rank.
    """
    if config.data.synthetic:
        return
    rank = distributed.Rank.from_environment()
    if rank.rank > 0:
        return
    goes_on = bool(checkpoints(Path(config.checkpoint.save)))  # then it is the checkpoint that tells the streams
    splits = (["train"] if not goes_on else []) + (["val"] if config.train.val_interval else [])
    size = config.parallel.data_parallel_size(rank.world_size)
    for split in splits:
        try:
            open_loader(config, architecture, newest(Path(config.model.checkpoint)), split, 0, size).close()
        except ValueError as error:
            if split == "train":
                raise
            option = f"--train.val-interval {config.train.val_interval}"
            raise ValueError(f"{option} reads a val split, and {error}; or leave the option out") from None


def open_loader(
    config: RunConfig,
    architecture: Architecture,
    source: Path | None,
    split: str,
    data_parallel_rank: int,
    data_parallel_size: int,
    states: Sequence[bytes] = (),
) -> Any:
    """What reads a split for one replica, or makes it up; see `build_loader`."""
    pictures = Pictures(**architecture.picture_options())
    is_written = not config.data.synthetic or pictures.tile_tags  # whether there is any text
    common: dict[str, Any] = {
        "tokenizer": load_tokenizer(source / TOKENIZER_DIR) if source and is_written else None,
        "conversation": config.data.conversation or architecture.conversation,
        "pictures": pictures,
        "micro_batch_size": config.train.micro_batch_size,
        "data_parallel_rank": data_parallel_rank,
        "data_parallel_size": data_parallel_size,
        "seed": config.train.seed,
        "states": states,
    }
    if config.data.synthetic:
        assert architecture.language is not None
        return SyntheticLoader(config.data, vocab_size=architecture.language.vocab_size, **common)
    data = config.data if split == "train" else replace(config.data, shuffle_buffer_size=0)
    return build_loader(data, split=split, loss_weighting=config.train.loss_weighting, **common)


class Batches(Iterator[Batch]):
    """Micro batches of this rank's replica: its data source reads them, the others receive them."""

    def __init__(
        self,
        config: RunConfig,
        architecture: Architecture,
        source: Path | None,
        *,
        resumed: bool = False,
        split: str = "train",
    ) -> None:
        self.image_token_id = architecture.image_token_id
        self.loader: Any = None
        if not distributed.is_data_source():
            return
        rank, size = distributed.data_parallel_rank(), distributed.data_parallel_size()
        states = ckpt.loader_states(source) if source and resumed else ()
        self.loader = open_loader(config, architecture, source, split, rank, size, states)
        self.iterator = iter(self.loader)

    def __next__(self) -> Batch:
        beat()
        read = distributed.broadcast_in_replica(self._read(), first_stage_only=("images",))
        if isinstance(read, Exception):
            raise read
        return read

    def _read(self) -> Batch | Exception | None:
        """The next batch, whole but for its journey; what went wrong instead, for all ranks to raise it."""
        if not self.loader:
            return None
        try:
            batch: Batch = next(self.iterator)
        except Exception as error:
            return error
        return batch if self.image_token_id is None else with_image_positions(batch, self.image_token_id)

    def counts(self) -> dict[str, Count]:
        """Of each source, what this rank's loader has read so far."""
        return self.loader.counts() if self.loader else {}

    @property
    def sources(self) -> tuple[str, ...]:
        """Names, where data is read."""
        return self.loader.sources if self.loader else ()

    def close(self) -> None:
        if self.loader:
            self.loader.close()

    def state(self) -> bytes | None:
        return self.loader.state_dict() if self.loader else None
