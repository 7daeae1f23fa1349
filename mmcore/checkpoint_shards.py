"""megatron-core's torch_dist format: written by threads of this process, read without running what it names.

megatron-core writes in forked processes and waits for ever for one that is killed, and torch unpickles
whatever a checkpoint's files name. Here both are replaced; planning and the files stay theirs.
"""

import io
import queue
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mmcore import host
from mmcore.pickles import read_description, read_state, read_tensor

host.use_host()

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config  # noqa: E402  (host first)
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as torch_dist  # noqa: E402
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy  # noqa: E402
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync  # noqa: E402
from megatron.core.msc_utils import MultiStorageClientFeature  # noqa: E402

# energon brings this package, and megatron-core then writes through it, where our errors and syncs are not.
MultiStorageClientFeature.disable()

# Else megatron-core spawns a server process for results that only its own writers send: seconds, 300 MB a
# rank, and an orphan if the rank is killed.
filesystem_async._results_queue = queue.SimpleQueue()

COMMON_FILE = "common.pt"
_BACKEND, _VERSION = "torch_dist", 1


class Shards:
    """This rank's share of a checkpoint, on the host and ready to be written."""

    def __init__(self, writer: FileSystemWriterAsync, metadata: Metadata | None) -> None:
        self.writer, self.metadata = writer, metadata
        self.buckets = FileSystemWriterAsync.preload_tensors(writer.write_buckets, True)

    def keep(self, parameters: Iterable[torch.Tensor]) -> None:
        """Copy what is still these parameters themselves, which training goes on to change.

        Nearly all is a copy by now: what lay on a GPU, what is a part of DDP's buffers, and the optimizer's
        state, which was gathered. On the host a parameter that is all of its buffer is not.
        """
        live = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.buckets = [
            (path, name, (others, [(item, _apart(tensor, live)) for item, tensor in tensors]))
            for path, name, (others, tensors) in self.buckets
        ]

    @property
    def names(self) -> list[str]:
        return [name for _, name, _ in self.buckets]

    def write(self) -> list[WriteResult]:
        """Write this rank's files, one thread each; safe in any thread, for no other rank is waited for.

        Raises:
            Exception: what the first file that failed raised: mostly an OSError.
        """
        with ThreadPoolExecutor(max(1, len(self.buckets))) as pool:
            results = list(pool.map(self._write_file, self.buckets))
        return [result for of_file in results for result in of_file]

    def _write_file(self, bucket: Any) -> list[WriteResult]:
        outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        running: queue.Queue[int] = queue.Queue()  # megatron-core's writer signs off from it
        running.put(0)
        FileSystemWriterAsync.write_preloaded_data([self.writer.transforms], 0, bucket, outcomes, running, True)
        _, outcome = outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome
        return list(outcome)

    def finish(self, folder: Path, results: Sequence[list[WriteResult]]) -> None:
        """Write the description of the whole, on the main rank alone.

        Args:
            results: what `write` returned, by rank.
        """
        assert self.metadata is not None
        self.writer.finish(self.metadata, list(results))
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(folder))


def plan_shards(state: dict[str, Any], folder: Path) -> tuple[Shards, bytes]:
    """Agree on who writes what; all ranks call it.

    Args:
        state: megatron-core's sharded state dict.
        folder: exists.
    Returns:
        This rank's share, and the content of common.pt, which the main rank is to write.
    """
    sharded, common = save_preprocess(state)
    content = io.BytesIO()
    torch.save(common, content)
    return _Strategy(_BACKEND, _VERSION).async_save(sharded, folder), content.getvalue()


def read_shards(wanted: list[Any], folder: Path) -> None:
    """Fill the tensors of megatron-core's shards from a checkpoint, in place. All ranks call it, each with its own.

    Args:
        wanted: shards in nested dicts, whose tensors are of any layers of a stack: megatron-core itself would want to
            know of all of them.
    """
    for shard in (shards := list(nested_values(wanted))):
        ahead = (1,) * shard.prepend_axis_num  # a layer's place in the stack
        shard.local_shape, shard.prepend_axis_num = (*ahead, *shard.local_shape), 0
        shard.data = shard.data.view(shard.local_shape)
    torch_dist.TorchDistLoadShardedStrategy().load(dict(enumerate(shards)), folder)


class _Strategy(torch_dist.TorchDistSaveShardedStrategy):
    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        return Shards(writer, save_state_dict_ret[1])


def _apart(tensor: torch.Tensor, live: set[int]) -> torch.Tensor:
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor


class _Reader(FileSystemReader):
    """torch's, but for the pickles in it, which it would let run anything or take any memory."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.description: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.description is None:
            self.description = read_description(Path(self.path))
            if self.description.storage_meta is not None:
                self.description.storage_meta.load_id = self.load_id
        return self.description

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            path = Path(self.path) / place.relative_path
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(_part(path, place.offset, place.length)))
                continue
            whole = read_tensor(path, place.offset, place.length)
            piece = narrow_tensor_by_index(whole, item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            if piece.shape != target.shape:  # which copy_ might mend
                raise ValueError(f"{path}: {item.storage_index.fqn} is {list(piece.shape)}, not {list(target.shape)}")
            target.copy_(piece)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _part(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


class _LoadPlanner(torch_dist.MCoreLoadPlanner):
    """megatron-core's, but for objects that are no tensors: torch reads them, plain data only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(read_state(value), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _CommonLoader(TorchCommonLoadStrategy):
    """megatron-core's, but for what is in common.pt: plain data only, and no weights.

    It would take weights from there, among them Transformer Engine's `_extra_state`, which that unpickles.
    """

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        path = Path(checkpoint_dir) / COMMON_FILE
        content = read_state(path)
        if not isinstance(content, dict) or "model" in content:
            raise ValueError(f"{path} holds weights, whose place is among the shards: convert them again")
        return content


torch_dist.MCoreLoadPlanner = _LoadPlanner
torch_dist._get_filesystem_reader = lambda folder, cache_metadata=False: _Reader(folder)
register_default_strategy(StrategyAction.LOAD_COMMON, "torch", _VERSION, _CommonLoader())
