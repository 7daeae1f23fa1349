"""Where a run's micro batches come from: its dataset, or samples made up."""

from collections.abc import Iterator
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
from mmcore.models.architecture import Architecture


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
        pictures = Pictures(**architecture.picture_options())
        is_written = not config.data.synthetic or pictures.tile_tags  # whether there is any text
        common: dict[str, Any] = {
            "tokenizer": load_tokenizer(source / TOKENIZER_DIR) if source and is_written else None,
            "conversation": architecture.conversation,
            "pictures": pictures,
            "micro_batch_size": config.train.micro_batch_size,
            "data_parallel_rank": distributed.data_parallel_rank(),
            "data_parallel_size": distributed.data_parallel_size(),
            "seed": config.train.seed,
            "states": ckpt.loader_states(source) if source and resumed else (),
        }
        if config.data.synthetic:
            assert architecture.language is not None
            self.loader = SyntheticLoader(config.data, vocab_size=architecture.language.vocab_size, **common)
        else:
            data = config.data if split == "train" else replace(config.data, shuffle_buffer_size=0)
            self.loader = build_loader(data, split=split, loss_weighting=config.train.loss_weighting, **common)
        self.iterator = iter(self.loader)

    def __next__(self) -> Batch:
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
