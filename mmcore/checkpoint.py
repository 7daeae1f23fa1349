"""Save, verify, publish, load: a checkpoint is a folder that is either whole or not there.

    RUN/step_00000100/   one checkpoint of a run (a converter's output has the same first three rows)
        .metadata, common.pt, metadata.json, *.distcp    weights and optimizer, megatron-core's torch_dist
        model.json                                       the architecture
        tokenizer/                                       the tokenizer's files
        run.json                                         step, samples and tokens so far, the run's configuration
        loader_00000.bin                                 where the data stands, one file a data parallel rank
        manifest.json                                    size and CRC-32 of every file

It is written as `RUN/.incomplete-step_00000100` and renamed at the end. Training draws no random
numbers after initialisation (these models have no dropout, the loader seeds itself), so there is no
generator state to keep.
"""

import json
import queue
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmcore import distributed
from mmcore.constants import TOKENIZER_DIR
from mmcore.models.architecture import Architecture, checkpoints, save_architecture

from megatron.core import dist_checkpointing  # isort: skip  (after mmcore.distributed, which mends it)
from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip

RUN_FILE, MANIFEST_FILE = "run.json", "manifest.json"
INCOMPLETE = ".incomplete-"

# megatron-core spawns a server process for the results of asynchronous writes: seconds and 300 MB a
# rank, and an orphan if the rank is killed. We write synchronously, where a queue in the process does.
filesystem_async._results_queue = queue.SimpleQueue()

# The optimizer is stored by parameter, not by rank's bucket: any layout can load it.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def load_checkpoint(folder: Path, model: Any, optimizer: Any = None) -> dict[str, Any]:
    """Load weights, and the optimizer's state where one is given, at any layout.

    Args:
        folder: a checkpoint, as `architecture.newest` returns it.
        model: `LlavaModel` or its DDP wrapper.
        optimizer: megatron-core's, or None for the weights alone.
    Returns:
        The content of run.json, or {} for a converter's checkpoint.
    Raises:
        ValueError: the files are not those that were written.
    """
    problems = verify(folder) if distributed.is_main() else []
    shared = [problems]
    dist.broadcast_object_list(shared, 0)
    if shared[0]:
        raise ValueError(f"{folder} is damaged: {'; '.join(shared[0])}. Take another checkpoint, or convert it again")
    state = _sharded(model, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(state, str(folder))
    weights = loaded.get("model", {})  # megatron-core leaves out what is empty: a stage without weights
    missing, unexpected = _unwrapped(model).load_state_dict(weights, strict=False)
    missing = [key for key in missing if not key.endswith("_extra_state")]  # left out on purpose, see _sharded
    assert not missing and not unexpected, f"missing {missing}, unexpected {unexpected}"
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    run = folder / RUN_FILE
    return json.loads(run.read_text()) if run.is_file() else {}


def save_checkpoint(
    run: Path,
    step: int,
    *,
    model: Any,
    optimizer: Any,
    architecture: Architecture,
    tokenizer: Path,
    state: dict[str, Any],
    loader_state: bytes | None,
    keep_last: int,
) -> Path:
    """Write `run/step_NNNNNNNN`, publish it, and drop the oldest beyond `keep_last`. All ranks call it.

    Args:
        tokenizer: folder whose files go along.
        state: what run.json holds beside the step.
        loader_state: this rank's, where it reads data.
    Returns:
        The published folder.
    """
    final = run / f"step_{step:08d}"
    folder = run / (INCOMPLETE + final.name)
    if distributed.is_main():
        run.mkdir(parents=True, exist_ok=True)
        for leftover in run.glob(INCOMPLETE + "*"):
            shutil.rmtree(leftover)
        folder.mkdir()
        save_architecture(architecture, folder)
        shutil.copytree(tokenizer, folder / TOKENIZER_DIR)
        (folder / RUN_FILE).write_text(json.dumps({**state, "step": step}, indent=2) + "\n")
    dist.barrier()
    if loader_state is not None:
        loader_file(folder, distributed.data_parallel_rank()).write_bytes(loader_state)
    dist_checkpointing.save(_sharded(model, optimizer, is_loading=False), str(folder))
    dist.barrier()
    if distributed.is_main():
        write_manifest(folder)
        if final.exists():  # a run that went back to an older checkpoint comes by again
            shutil.rmtree(final)
        folder.rename(final)
        for old in checkpoints(run)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def loader_file(folder: Path, data_parallel_rank: int) -> Path:
    return folder / f"loader_{data_parallel_rank:05d}.json"


def loader_states(folder: Path) -> list[bytes]:
    """Where the data of each data parallel rank stood when the checkpoint was written, in the ranks' order."""
    return [path.read_bytes() for path in sorted(folder.glob("loader_*.json"))]


def write_manifest(folder: Path) -> None:
    """Record size and CRC-32 of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {str(path.relative_to(folder)): [path.stat().st_size, _crc32(path)] for path in files}
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n")


def verify(folder: Path) -> list[str]:
    """What differs from the manifest, file by file; nothing to compare without one."""
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return []
    problems = []
    for name, (size, crc) in json.loads(manifest.read_text()).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif _crc32(path) != crc:
            problems.append(f"{name} has other content than was written")
    return problems


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _unwrapped(model: Any) -> Any:
    return model.module if hasattr(model, "ddp_config") else model


def _sharded(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    weights = _unwrapped(model).sharded_state_dict()
    # Transformer Engine's FP8 history is rebuilt within steps, and other backends have none.
    weights = {key: value for key, value in weights.items() if not key.endswith("_extra_state")}
    state = {"model": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_METADATA)
        state["untrained"] = _untrained_layers(model, weights, state["optimizer"])
    return state


def _untrained_layers(model: Any, weights: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state, all zeros, of layers that have none while others of their stack are trained.

    megatron-core keeps the layers of a block in one tensor, and writes no tensor with holes. The layers
    of a vision tower above its feature layer are such.
    """
    trained = {tensor.key: tensor.dtype for tensor in nested_values(optimizer) if isinstance(tensor, ShardedTensor)}
    found = {}
    for name, parameter in _unwrapped(model).named_parameters():
        weight = weights[name]
        if parameter.requires_grad or not isinstance(weight, ShardedTensor):
            continue
        for moment in ("param", "exp_avg", "exp_avg_sq"):
            key = f"optimizer.state.{moment}.{weight.key}"
            if key in trained:
                zeros = torch.zeros_like(parameter, dtype=trained[key], requires_grad=False)
                found[f"{moment}.{name}"] = replace(weight, key=key, data=zeros, dtype=trained[key])
    return found
