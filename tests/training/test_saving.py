"""Saving loses nothing: not to a full disk, a kill, damage, nor to training that goes on meanwhile."""

import os
import pickle
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mmcore import checkpoint, distributed
from mmcore import checkpoint_files as files
from mmcore.checkpoint_shards import COMMON_FILE, Shards, plan_shards
from mmcore.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from mmcore.models.architecture import Architecture
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import train_step
from tests import ranks, tiny
from tests.training.test_layouts import microbatches

ALONE, PAIR = ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2)


class Run:
    """What a rank trains, and how it is saved; after one step, for the optimizer has no state of its own before."""

    def __init__(
        self, layout: ParallelConfig, folder: Path, *, seed: int = 5, trained: str = "", steps: int = 1, **config: Any
    ) -> None:
        self.config = CheckpointConfig(save=str(folder), **config)
        self.model = tiny.build(layout, seed=seed)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and trained in name)
        self.ddp = wrap(self.model)
        optimizer = OptimizerConfig(lr=2e-3, weight_decay=0.1, lr_warmup_steps=2)
        self.optimizer = build_optimizer(optimizer, self.ddp)
        self.scheduler = build_scheduler(optimizer, self.optimizer, 20)
        self.train(steps)

    def train(self, steps: int) -> list[float]:
        results = [train_step(self.ddp, self.optimizer, self.scheduler, microbatches()) for _ in range(steps)]
        return [value for result in results for value in (result.total.loss, result.grad_norm)]

    def save(self, step: int) -> checkpoint.Saving:
        return checkpoint.Saving(
            self.config,
            step,
            model=self.ddp,
            optimizer=self.optimizer,
            architecture=self.model.architecture,
            tokenizer=Path(self.config.save) / "tokenizer",
            state={"consumed_samples": 10 * step},
            loader_state=b"loader" if distributed.is_data_source() else None,
        )

    def weights(self) -> list[list[float]]:
        return [parameter.flatten().tolist() for parameter in self.model.parameters()]

    def resume(self) -> dict[str, Any]:
        folder, _ = checkpoint.newest_whole(Path(self.config.save))
        assert folder
        state = checkpoint.load_checkpoint(folder, self.ddp, self.optimizer, is_verified=True)
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=state["step"])
        return state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "words").write_text("one two")
    return tmp_path


@contextmanager
def held_writers() -> Iterator[threading.Event]:
    """Writers that write nothing before the event is set."""
    event, write = threading.Event(), Shards.write
    with mock.patch.object(Shards, "write", lambda shards: event.wait(60) and write(shards)):
        yield event


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "tokenizer")


@pytest.mark.parametrize("trained", ["", "language_model.output_layer.weight"])
def test_training_goes_on_while_files_are_written(trained: str, folder: Path) -> None:
    """What is stored is the state at the save, whatever training does before a byte is written.

    A weight that is trained alone is all of its buffer, of which nothing else makes a copy.
    """

    def train() -> tuple[list[float], list[bool], list[list[float]]]:
        run = Run(PAIR, folder, trained=trained, async_save=True)
        losses = run.train(1)
        with held_writers() as event:
            saving, weights = run.save(2), run.weights()
            seen = [saving.is_written()]
            losses += run.train(2)
            seen.append(bool(files.step_folders(folder)))
            event.set()
            saving.thread.join()
            seen.append(saving.is_written())
        assert saving.finish() == files.step_folder(folder, 2)
        return losses, seen, weights

    def resume() -> tuple[int, int, list[list[float]], list[float]]:
        run = Run(PAIR, folder, seed=9, trained=trained)
        checkpoint.load_checkpoint(files.step_folder(folder, 2), run.ddp)
        weights, state = run.weights(), run.resume()
        return state["step"], state["consumed_samples"], weights, run.train(2)

    for (losses, seen, weights), resumed in zip(ranks.run(train, PAIR, 2), ranks.run(resume, PAIR, 2), strict=True):
        assert seen == [False, False, True]
        assert resumed == (2, 20, weights, losses[2:])
    assert files.verify(files.step_folder(folder, 2)) == []


def test_a_save_before_the_first_update(folder: Path) -> None:
    """As after bad steps, which update nothing: masters are the weights then, and moments zero."""

    def save() -> list[float]:
        run = Run(ALONE, folder, steps=0)
        run.save(0).finish()
        return run.train(3)

    def resume() -> list[float]:
        run = Run(ALONE, folder, seed=9)
        run.resume()
        return run.train(3)

    saved = ranks.run(save, ALONE, 2)
    assert ranks.run(resume, ALONE, 2) == saved


def test_bytes_are_those_that_were_foreseen(folder: Path) -> None:
    """Of tensors, all but the optimizer's of the norm after the tower's last layer, which is never trained."""

    def save() -> Architecture:
        run = Run(ALONE, folder)
        run.save(1).finish()
        return run.model.architecture

    (architecture,) = ranks.run(save, ALONE, 1)
    stored = pickle.loads((files.step_folder(folder, 1) / ".metadata").read_bytes()).state_dict_metadata.values()
    found = sum(tensor.size.numel() * tensor.properties.dtype.itemsize for tensor in stored)
    norm = 2 * tiny.VISION.hidden_size
    assert files.checkpoint_bytes(architecture, (), 4) - files.OPTIMIZER_BYTES * norm == found


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk(folder: Path) -> None:
    """Whichever rank it hits, in whichever file: an error on all, the older checkpoint as it was, and no torn one."""

    def save() -> list[str]:
        run = Run(PAIR, folder)
        run.save(1).finish()
        told = []
        for rank, size in ((1, 9000), (0, 9000), (0, 500)):
            with full_disk(size if rank == int(os.environ["RANK"]) else resource.RLIM_INFINITY):
                try:
                    run.save(2).finish()
                except checkpoint.SaveError as error:
                    told.append(str(error))
            told += names(folder) if distributed.is_main() else []
        no_room = mock.Mock(side_effect=OSError(28, "No space left on device"))
        with mock.patch.object(files, "write_manifest", no_room), pytest.raises(checkpoint.SaveError) as raised:
            run.save(2).finish()
        run.save(3).finish()
        return [*told, str(raised.value)]

    main, other = ranks.run(save, PAIR, 2)
    started = f"writing {folder}/step_00000002 failed"
    assert [text for text in main if text != "step_00000001"] == other and len(other) == 4
    assert other[0].startswith(f"{started} (rank 1: [Errno 27] File too large")
    assert other[1].startswith(f"{started} (rank 0: [Errno 27] File too large")
    assert other[2].startswith(f"{started} ([Errno 27] File too large")
    assert other[3].startswith(f"{started} ([Errno 28] No space left")
    assert all("step_00000001 is the newest one that is whole" in text for text in other)
    assert main.count("step_00000001") == 3 and names(folder) == ["step_00000001", "step_00000003"]
    assert files.verify(folder / "step_00000001") == []


def test_a_long_save_is_no_timeout(folder: Path) -> None:
    """Ranks wait outside of collectives while one of them writes and the main one publishes and deletes."""

    def save() -> list[float]:
        run = Run(PAIR, folder, keep_last=1)
        run.save(1).finish()
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
        slow = {(Shards, "write"): 1, (files, "publish"): 0, (files, "prune"): 0}
        with ExitStack() as patches:
            for (owner, name), rank in slow.items():
                if rank == distributed.Rank.from_environment().rank:
                    action = getattr(owner, name)
                    late = lambda *args, action=action: (time.sleep(1.5), action(*args))[1]  # noqa: E731
                    patches.enter_context(mock.patch.object(owner, name, late))
            run.save(2).finish()
        return run.train(1)

    assert len(ranks.run(save, PAIR, 2)) == 2 and names(folder) == ["step_00000002"]


def test_killed_while_files_are_written(folder: Path) -> None:
    def train() -> None:
        run = Run(ALONE, folder, async_save=True)
        run.save(1).finish()
        with held_writers():
            run.save(2)
            run.train(1)
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match="killed"):
        ranks.run(train, ALONE, 1)
    assert names(folder) == [".incomplete-step_00000002", "step_00000001"]

    def resume() -> int:
        run = Run(ALONE, folder)
        step = run.resume()["step"]
        run.save(2).finish()
        return int(step)

    assert ranks.run(resume, ALONE, 1) == [1]
    assert names(folder) == ["step_00000001", "step_00000002"]


def test_damaged_checkpoints_are_passed_over(folder: Path) -> None:
    """Found by ranks that each look at some of the files, renamed by one; never counted as kept."""

    def save() -> None:
        run = Run(ALONE, folder)
        for step in (1, 2):
            run.save(step).finish()

    ranks.run(save, ALONE, 1)
    flipped = next((folder / "step_00000002").glob("*.distcp"))
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    shutil.copytree(folder / "step_00000001", folder / "step_00000003")
    (folder / "step_00000003" / "manifest.json").unlink()
    (folder / "step_00000004").mkdir()

    def resume() -> tuple[Path | None, list[str]]:
        found = checkpoint.newest_whole(folder)
        run = Run(PAIR, folder)
        run.resume()
        run.save(2).finish()
        return found

    results = ranks.run(resume, PAIR, 2)
    assert results[0] == results[1]
    found, told = results[0]
    assert found == folder / "step_00000001"
    asides = [f"damaged-step_0000000{step}" for step in (2, 3, 4)]
    reasons = [f"{flipped.name} has other content than was written", "manifest.json is missing", "manifest.json is"]
    for text, aside, reason in zip(told, reversed(asides), reversed(reasons), strict=True):
        assert reason in text and text.endswith(f"kept as {aside}, and the run goes on from step_00000001")
    assert names(folder) == [*asides, "step_00000001", "step_00000002"]


def test_nothing_is_whole(folder: Path) -> None:
    """An error, and no name is changed: else the next start would begin from nothing."""
    for step in (1, 2):
        (folder / f"step_0000000{step}").mkdir()

    def resume() -> str:
        with pytest.raises(ValueError) as raised:
            checkpoint.newest_whole(folder)
        assert checkpoint.newest_whole(folder / "tokenizer") == (None, [])
        return str(raised.value)

    (told,) = ranks.run(resume, ALONE, 1)
    assert told.startswith(
        f"every checkpoint of {folder} is damaged (step_00000002: manifest.json is missing; step_00000001: "
    )
    assert names(folder) == ["step_00000001", "step_00000002"]


def draws() -> list[list[float]]:
    """What torch's and megatron-core's generators give next."""
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3).tolist()
    return [inside, torch.rand(3).tolist()]


def test_random_generators_go_on(folder: Path) -> None:
    """At the same layout, each rank where it stood; at another as its seed began them."""

    def save() -> list[list[float]]:
        run = Run(PAIR, folder)
        draws()
        run.save(1).finish()
        return draws()

    def resume(layout: ParallelConfig) -> list[list[float]]:
        run = Run(layout, folder)
        run.resume()
        return draws()

    drawn = ranks.run(save, PAIR, 2)
    assert drawn[0][0] != drawn[1][0]  # tensor ranks draw apart inside, and alike outside
    assert ranks.run(resume, PAIR, 2, PAIR) == drawn
    assert ranks.run(resume, ALONE, 1, ALONE) == ranks.run(lambda: (Run(ALONE, folder), draws())[1], ALONE, 1)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_what_a_checkpoint_names_is_not_run(folder: Path) -> None:
    """Neither by its description nor by an object among its tensors; and their manifests say that all is well."""

    def load() -> list[str]:
        run = Run(ALONE, folder)
        step, told = run.save(1).finish(), []
        content = (step / ".metadata").read_bytes()
        description = pickle.loads(content)
        description.payload = Payload(folder / "ran")
        (step / ".metadata").write_bytes(pickle.dumps(description))
        files.write_manifest(step, {})
        with pytest.raises(ValueError) as raised:
            run.resume()
        told.append(str(raised.value))
        (step / ".metadata").write_bytes(content[:-100])
        files.write_manifest(step, {})
        with pytest.raises(ValueError) as raised:
            run.resume()
        return [*told, str(raised.value)]

    for text, reason in zip(
        ranks.run(load, ALONE, 1)[0], ("posix.mkdir is not part of a checkpoint's description", ""), strict=True
    ):
        assert text.startswith(
            f"{folder}/step_00000001/.metadata cannot be read as the description of a checkpoint ({reason}"
        )
    assert not (folder / "ran").exists()


def test_objects_among_tensors(folder: Path) -> None:
    """Plain ones come back; what one names is not run."""

    def through(name: str, thing: Any) -> Any:
        (at := folder / name).mkdir()
        state = {"thing": ShardedObject("thing", thing, (1,), (0,))}
        shards, common = plan_shards(state, at)
        (at / COMMON_FILE).write_bytes(common)
        shards.finish(at, [shards.write()])
        return dist_checkpointing.load({"thing": ShardedObject("thing", None, (1,), (0,))}, str(at))["thing"]

    def load() -> tuple[Any, str]:
        with pytest.raises(BaseException) as raised:
            through("crafted", Payload(folder / "ran"))
        return through("plain", {"a": [1, 2.0, "three"]}), str(raised.value)

    ((plain, told),) = ranks.run(load, ALONE, 1)
    assert plain == {"a": [1, 2.0, "three"]} and "posix.mkdir" in told
    assert not (folder / "ran").exists()
