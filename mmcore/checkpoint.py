"""Save, verify, publish, load: a checkpoint is a folder that is either whole or not there.

    RUN/step_00000100/   one checkpoint of a run (a converter's output has the same first three rows)
        .metadata, common.pt, metadata.json, *.distcp    weights and optimizer, megatron-core's torch_dist
        model.json                                       the architecture
        tokenizer/                                       the tokenizer's files
        run.json                                         step, samples and tokens so far, the run's configuration
        loader_00000.json                                where the data stands, one file a data parallel rank
        random_tp0of2_pp0of1.pt                          random generators, one file a rank of a replica
        manifest.json                                    size and CRC-32 of every file

It is written as `RUN/.incomplete-step_00000100` and renamed at the end. Each rank's files are written by a
thread of its own, for which training may wait or not; ranks agree on what became of them in `Saving.finish`,
so that a full disk on one of them is an error on all and not a hang.
"""

import io
import json
import shutil
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmcore import checkpoint_files as files
from mmcore import distributed, host
from mmcore.checkpoint_optimizer import KINDS, deal, load_optimizer, sharded_optimizer
from mmcore.checkpoint_shards import COMMON_FILE, plan_shards, read_description
from mmcore.config import CheckpointConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.models.architecture import Architecture, save_architecture
from mmcore.pickles import read_state

from megatron.core import dist_checkpointing, parallel_state  # isort: skip  (after mmcore.distributed, which mends it)
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron.core.tensor_parallel import get_cuda_rng_tracker  # isort: skip
from megatron.core.tensor_parallel.random import _get_cuda_rng_state, _set_cuda_rng_state  # isort: skip

RUN_FILE = "run.json"


class SaveError(Exception):
    """A checkpoint could not be written: the run's older ones are as they were."""


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """Where a run goes on: its newest checkpoint whose files are those that were written. All ranks call it.

    Newer ones are set aside under other names, and what a kill left behind is taken away: no save may be on its way.

    Returns:
        The checkpoint, None where the run has none, and what to tell about those that were passed over.
    Raises:
        ValueError: it has some, and all are damaged; nothing is renamed then.
    """
    damaged: list[tuple[Path, str]] = []
    if distributed.is_main():
        files.clear_incomplete(run)
    for folder in reversed(_shared(files.step_folders(run))):
        problems = _problems(folder, needs_manifest=True)
        if not problems:
            asides = _shared([files.set_aside(path) for path, _ in damaged] if distributed.is_main() else [])
            return folder, [
                f"{path} is damaged: {problem}. It is kept as {aside.name}, and the run goes on from {folder.name}"
                for (path, problem), aside in zip(damaged, asides, strict=True)
            ]
        damaged.append((folder, _brief(problems)))
    if damaged:
        told = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
        raise ValueError(
            f"every checkpoint of {run} is damaged ({told}). To begin again, give --checkpoint.save another folder, or "
            "move these elsewhere"
        )
    return None, []


def load_checkpoint(folder: Path, model: Any, optimizer: Any = None, *, is_verified: bool = False) -> dict[str, Any]:
    """Load weights at any layout; where an optimizer is given its state, and random generators at the same layout.

    Args:
        folder: a checkpoint, as `architecture.newest` or `newest_whole` returns it.
        model: `LlavaModel` or its DDP wrapper.
        optimizer: megatron-core's, or None for the weights alone.
        is_verified: whether its files were compared with the manifest already.
    Returns:
        The content of run.json, or {} for a converter's checkpoint.
    Raises:
        ValueError: the files are not those that were written, or name what is no part of a checkpoint.
    """
    if not is_verified and (problems := _problems(folder)):
        raise ValueError(f"{folder} is damaged: {_brief(problems)}. Take another checkpoint, or convert it again")
    read_description(folder)  # torch reads it again, and keeps to itself why it could not
    loaded = dist_checkpointing.load({"model": _weights(model)}, str(folder))
    weights = loaded.pop("model", {})  # megatron-core leaves out what is empty: a stage without weights
    missing, unexpected = _unwrapped(model).load_state_dict(weights, strict=False)
    missing = [key for key in missing if not key.endswith("_extra_state")]  # left out on purpose, see _weights
    assert not missing and not unexpected, f"missing {missing}, unexpected {unexpected}"
    del weights
    if optimizer is not None:
        load_optimizer(optimizer, _weights(model), folder, loaded["optimizer"])
        _load_random(folder / _random_file())
    run = folder / RUN_FILE
    return json.loads(run.read_text()) if run.is_file() else {}


class Saving:
    """A checkpoint on its way to the disk. All ranks make one, and all end it by `finish`."""

    def __init__(
        self,
        config: CheckpointConfig,
        step: int,
        *,
        model: Any,
        optimizer: Any,
        architecture: Architecture,
        tokenizer: Path,
        state: dict[str, Any],
        loader_state: bytes | None,
        best: Sequence[int] = (),
    ) -> None:
        """Copy what is to be kept, and begin to write it; with `config.async_save` training may go on.

        Args:
            config: the run's folder, and what it keeps.
            tokenizer: folder whose files go along.
            state: what run.json holds beside the step.
            loader_state: this rank's, where it reads data.
            best: steps of the run by the score of their checkpoints, the best first; the main rank's counts.
        Raises:
            SaveError: the folder cannot be begun.
        """
        self.config, self.run, self.best = config, Path(config.save), best
        self.final = files.step_folder(self.run, step)
        self.folder = self.run / (files.INCOMPLETE + self.final.name)

        def begin() -> None:
            self.run.mkdir(parents=True, exist_ok=True)
            files.clear_incomplete(self.run)
            self.folder.mkdir()
            save_architecture(architecture, self.folder)
            shutil.copytree(tokenizer, self.folder / TOKENIZER_DIR)
            (self.folder / RUN_FILE).write_text(json.dumps({**state, "step": step}, indent=2) + "\n")

        self._on_main(f"writing {self.final}", begin)
        self.shards, common = plan_shards(_sharded(model, optimizer), self.folder)
        if config.async_save:
            self.shards.keep(_unwrapped(model).parameters())
        self.small = {COMMON_FILE: common} if distributed.is_main() else {}
        if loader_state is not None:
            self.small[loader_file(self.folder, distributed.data_parallel_rank()).name] = loader_state
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            self.small[_random_file()] = _random_state()
        self.written: tuple[list[Any], dict[str, files.Checksum]] = [], {}
        self.error = f"rank {dist.get_rank()}: its writer was ended"  # until it has come to its end
        self.thread = threading.Thread(target=self._write, name=f"saving {self.final.name}", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        """All of this rank's files, in the thread: what fails is kept for `finish`, where all ranks learn of it."""
        try:
            for name, content in self.small.items():
                (self.folder / name).write_bytes(content)
            results = self.shards.write()
            names = [*self.small, *self.shards.names]
            self.written = results, {name: files.checksum(self.folder / name) for name in names}
            self.error = ""
        except Exception as error:
            # What is not the disk's fault is told whole: who mends it wants to know where.
            self.error = f"rank {dist.get_rank()}: {_of_disk(error) or traceback.format_exc()}"
        self.shards.buckets, self.small = [], {}  # as large as the model: of no use to a run that goes on

    def is_written(self) -> bool:
        """Whether all ranks have written their files, so that `finish` waits for nothing. All ranks call it."""
        running = torch.tensor(int(self.thread.is_alive()), device=host.device())
        dist.all_reduce(running, op=dist.ReduceOp.MAX)
        return not running.item()

    def finish(self) -> Path:
        """Wait until all is written, publish it, and drop what the run does not keep.

        Returns:
            The published folder.
        Raises:
            SaveError: on all ranks, if any failed; nothing is published, and no older checkpoint is touched.
        """
        self.thread.join()
        distributed.meet()  # some ranks have much to write, and some nothing
        main = distributed.is_main()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.gather_object((self.written, self.error), gathered if main else None, 0)

        def publish() -> None:
            if errors := [error for _, error in gathered if error]:
                raise OSError("; ".join(errors))
            self.shards.finish(self.folder, [results for (results, _), _ in gathered])
            sums = {name: value for (_, of_rank), _ in gathered for name, value in of_rank.items()}
            files.write_manifest(self.folder, sums)
            files.publish(self.folder, self.final)

        self._on_main(f"writing {self.final}", publish)
        self._on_main(f"deleting old checkpoints of {self.run}", lambda: files.prune(self.run, self.config, self.best))
        return self.final

    def _on_main(self, what: str, action: Callable[[], None]) -> None:
        """Let the main rank act on the disk; if it fails there, take away what is incomplete and fail everywhere."""
        error = ""
        if distributed.is_main():
            try:
                action()
            except OSError as failure:
                # copytree goes on after a failure, and raises a list of them all
                error = failure.args[0][0][2] if isinstance(failure, shutil.Error) else str(failure)
                shutil.rmtree(self.folder, ignore_errors=True)
        if error := _shared(error):
            older = [folder.name for folder in files.step_folders(self.run)]
            rest = f"{older[-1]} is the newest one that is whole" if older else "the run has none yet"
            raise SaveError(
                f"{what} failed ({error}); {rest}. Mend the disk, most often by making room, and start the same "
                "command again: it goes on from there"
            )


def _of_disk(error: BaseException | None) -> OSError | None:
    """What the disk said, where that is behind an error: torch ends a file that it could not write by its own."""
    while error:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def save_checkpoint(run: Path, step: int, *, keep_last: int, **content: Any) -> Path:
    """Write a checkpoint of `run` and wait for it; `content` is that of `Saving`.

    Returns:
        The published folder.
    Raises:
        SaveError: it could not be written.
    """
    return Saving(CheckpointConfig(save=str(run), keep_last=keep_last), step, **content).finish()


def loader_file(folder: Path, data_parallel_rank: int) -> Path:
    return folder / f"loader_{data_parallel_rank:05d}.json"


def loader_states(folder: Path) -> list[bytes]:
    """Where the data of each data parallel rank stood when the checkpoint was written, in the ranks' order."""
    return [path.read_bytes() for path in sorted(folder.glob("loader_*.json"))]


def _shared(value: Any) -> Any:
    """The main rank's value, on every rank; it may have taken long to get it."""
    distributed.meet()
    shared = [value]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def _problems(folder: Path, *, needs_manifest: bool = False) -> list[str]:
    """What `files.verify` finds, the files dealt to the ranks. What a run has written has a manifest."""
    needs_manifest |= (folder / RUN_FILE).exists()
    if _shared(needs_manifest and not (folder / files.MANIFEST_FILE).is_file()):
        return [f"{files.MANIFEST_FILE} is missing"]
    found: list[Any] = [None] * dist.get_world_size()
    own = files.verify(folder, part=dist.get_rank(), parts=len(found))
    distributed.meet()
    dist.all_gather_object(found, own)
    return list(dict.fromkeys(problem for of_rank in found for problem in of_rank))


def _brief(problems: list[str]) -> str:
    rest = f", and {len(problems) - 3} more files" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + rest


def _random_file() -> str:
    """Its name tells the layout: a replica's ranks draw alike in every replica, and no other layout draws so."""
    tensor = (
        f"tp{parallel_state.get_tensor_model_parallel_rank()}of{parallel_state.get_tensor_model_parallel_world_size()}"
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return f"random_{tensor}_pp{stage}of{parallel_state.get_pipeline_model_parallel_world_size()}.pt"


def _random_state() -> bytes:
    """torch's generators and megatron-core's tracker of them."""
    content = io.BytesIO()
    states = {
        "host": torch.get_rng_state(),
        "device": _get_cuda_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    torch.save(states, content)
    return content.getvalue()


def _load_random(path: Path) -> None:
    """Set the generators; at another layout they stay as the run's seed began them."""
    if path.is_file():
        states = read_state(path)
        torch.set_rng_state(states["host"])
        _set_cuda_rng_state(states["device"])
        get_cuda_rng_tracker().set_states(states["tracker"])


def _unwrapped(model: Any) -> Any:
    return model.module if hasattr(model, "ddp_config") else model


def _weights(model: Any) -> dict[str, Any]:
    # Transformer Engine's FP8 history is rebuilt within steps, and other backends have none.
    weights = _unwrapped(model).sharded_state_dict()
    return {key: value for key, value in weights.items() if not key.endswith("_extra_state")}


def _sharded(model: Any, optimizer: Any) -> dict[str, Any]:
    weights = _weights(model)
    state = {"model": weights}
    if optimizer is not None:
        state["optimizer"] = sharded_optimizer(optimizer, weights)
        state["untrained"] = _untrained_layers(model, weights, optimizer)
    return state


def _untrained_layers(model: Any, weights: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Optimizer state, all zeros, of layers that have none while others of their stack are trained.

    megatron-core keeps the layers of a block in one tensor, and writes no tensor with holes. The layers
    of a vision tower above its feature layer are such.
    """
    trained = deal(optimizer)
    keys = {weights[name].key for name, parameter in _unwrapped(model).named_parameters() if parameter in trained}
    found = {}
    for name, parameter in _unwrapped(model).named_parameters():
        weight = weights[name]
        if parameter not in trained and weight.key in keys and isinstance(weight, ShardedTensor):
            for kind in KINDS:
                zeros = torch.zeros(parameter.shape, dtype=torch.float32)
                key = f"optimizer.state.{kind}.{weight.key}"
                found[f"{kind}.{name}"] = replace(weight, key=key, data=zeros, dtype=zeros.dtype)
    return found
