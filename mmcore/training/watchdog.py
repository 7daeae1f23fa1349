"""Ends a run in which nothing goes on any more, and says where each rank is.

A thread of each rank looks at what the training has marked. Where no rank has moved for --train.watchdog-minutes, or
one has not for half as long again, every rank hands its place and its stacks to the first, by way of the store that
torch has anyway. That one says in a line what hangs, writes all stacks to RUN/hang-STEP.txt, and all end with code 1.

Marks cost nothing. What is looked up only then: the Python stacks, the module in them, and the collective that a rank
waits for, from the flight recorder which torch 2.11 keeps for gloo and NCCL.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmcore import checkpoint, distributed
from mmcore.constants import EXIT_FAULT
from mmcore.data import workers
from mmcore.training.ends import write_end
from mmcore.training.marks import beat, here
from mmcore.training.scoring import Scoring
from mmcore.training.suspect import brief

# A rank speaks for itself after so many times the limit; while it writes, after so many without a byte.
ALONE, SAVING = 1.5, 6.0
# Seconds that ranks have to hand in where they are.
GRACE = 15.0
# Limits that loading may take: files are read through the page cache, of which the process counts no bytes.
LOADING = 6.0

_MEETING = {distributed.meet.__code__}
_PATIENT = {Scoring.finish.__code__}
_WRITING = {checkpoint.Saving.__init__.__code__, checkpoint.Saving.finish.__code__}
_LOADING = {checkpoint.newest_whole.__code__, checkpoint.load_checkpoint.__code__}
_KEY = "mmcore/hang"


_watch: "_Watch | None" = None


def start(run: Path, minutes: float, model: nn.Module) -> None:
    """Watch from here on; all ranks call it.

    Args:
        run: folder of the run.
        minutes: that nothing may happen for.
    """
    global _watch
    stop()
    _watch = _Watch(run, minutes * 60, model)
    _watch.thread.start()


def stop() -> None:
    """Watch no more; safe where nothing is watched."""
    global _watch
    if _watch:
        _watch.end.set()
        _watch.thread.join()
        _watch = None


class _Watch:
    def __init__(self, run: Path, limit: float, model: nn.Module) -> None:
        self.run, self.limit, self.model = run, limit, model
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # A connection of its own: another thread's call may be waiting in the one that torch uses.
        store: Any = dist.distributed_c10d._get_default_store()
        self.store: Any = store.clone() if self.size > 1 else None
        self.end = threading.Event()
        self.pause = min(5.0, limit / 10)
        self.written, self.written_at = _bytes_written(), time.monotonic()
        self.read: list[str] = []
        self.is_idle = False
        for part in getattr(model, "chunks", [model]):
            part.language_model.register_forward_pre_hook(beat)  # also where it answers
        beat()
        self.thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def _look(self) -> None:
        last = time.monotonic()
        while not self.end.wait(self.pause):
            # Where the interpreter itself is stuck this thread is, too: then one without Python ends the process.
            faulthandler.dump_traceback_later(ALONE * self.limit + 2 * GRACE, exit=True)
            now = time.monotonic()
            if now - last > 5 * self.pause + 1:  # all of the process stood still for a while: a debugger
                beat()
            last = now
            if (read := workers.readings()) != self.read:  # a row is waited for, and comes nearer
                self.read = read
                beat()
            if self._hangs(now):
                self._report()
        faulthandler.cancel_dump_traceback_later()

    def _hangs(self, now: float) -> bool:
        codes = {frame.f_code for frame in _frames(_main_thread())}
        still = now - here.moved
        if codes & _PATIENT:
            still = 0.0
        elif codes & _WRITING and not codes & _MEETING:
            if (written := _bytes_written()) != self.written:
                self.written, self.written_at = written, now
            still = min(still, now - self.written_at) / SAVING
        elif codes & _LOADING:
            still /= LOADING
        is_idle = still > self.limit
        if not self.store:
            return is_idle
        idle = 0
        with contextlib.suppress(RuntimeError):  # the store is gone, and the run with it
            idle = self.store.add(f"{_KEY}/idle", int(is_idle) - int(self.is_idle))
            self.is_idle = is_idle
            if self.store.check([f"{_KEY}/found"]):
                return True
        alone = still > ALONE * self.limit and not codes & _MEETING
        return alone or (is_idle and idle >= self.size)

    def _report(self) -> None:
        """Never returns."""
        faulthandler.dump_traceback_later(5 * GRACE, exit=True)
        try:
            own = self._place()
            if self.rank == 0:
                self._tell({0: own} | self._gather())
            elif not self._hand_in(own) and self._is_teller():  # the first rank is the one that hangs
                self._tell({self.rank: own} | self._gather())
        except Exception:  # whatever it is, the run is to end
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(EXIT_FAULT)

    def _gather(self) -> dict[int, dict[str, Any]]:
        """What other ranks hand in."""
        found: dict[int, dict[str, Any]] = {}
        others = set(range(self.size)) - {self.rank}
        with contextlib.suppress(RuntimeError):
            if self.store:
                self.store.set(f"{_KEY}/found", "")
            deadline = time.monotonic() + GRACE
            while len(found) < len(others) and time.monotonic() < deadline:
                for rank in others - found.keys():
                    if self.store.check([f"{_KEY}/{rank}"]):
                        found[rank] = json.loads(self.store.get(f"{_KEY}/{rank}"))
                time.sleep(0.1)
        return found

    def _hand_in(self, own: dict[str, Any]) -> bool:
        """Whether the first rank takes care of it."""
        try:
            self.store.set(f"{_KEY}/found", "")
            self.store.set(f"{_KEY}/{self.rank}", json.dumps(own))
            deadline = time.monotonic() + 2 * GRACE
            while time.monotonic() < deadline:
                if self.store.check([f"{_KEY}/told"]):
                    return True
                time.sleep(0.1)
        except RuntimeError:  # the store's process is gone: it was the first, and has told
            return True
        return False

    def _is_teller(self) -> bool:
        """Whether this rank speaks for all in the first one's place; the others let it."""
        with contextlib.suppress(RuntimeError):
            if self.store.add(f"{_KEY}/teller", 1) > 1:
                deadline = time.monotonic() + 2 * GRACE
                while time.monotonic() < deadline and not self.store.check([f"{_KEY}/told"]):
                    time.sleep(0.1)
                return False
        return True

    def _place(self) -> dict[str, Any]:
        frames, collective = _frames(_main_thread()), _collective()
        reads = workers.readings() if any("/data/" in frame.f_code.co_filename for frame in frames) else []
        return {
            "host": socket.gethostname(),
            "step": here.step,
            "still": time.monotonic() - here.moved,
            "part": here.part,
            "at": self._module(frames) or _code(frames),
            "collective": collective,
            "reads": reads,
            "keys": list(here.keys),
            "stacks": _stacks() + workers.worker_stacks(),
        }

    def _module(self, frames: Sequence[FrameType]) -> str:
        """Name of the innermost module that the main thread computes."""
        names = {id(module): name for name, module in self.model.named_modules()}
        for frame in frames:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and (name := names.get(id(owner))):
                return name
        return ""

    def _tell(self, places: dict[int, dict[str, Any]]) -> None:
        first = places[min(places)]
        path = self.run / f"hang-{first['step']}.txt"
        if self.rank:
            path = path.with_name(f"hang-{first['step']}-rank-{self.rank}.txt")
        said = told(places, self.size)
        print(f"mmcore train: {said}. The Python stacks of all ranks are in {path}", file=sys.stderr, flush=True)
        ranks = sorted(places.items())
        heads = [
            f"--- rank {rank}, {place['host']}: {_text(place)}; samples {', '.join(place['keys']) or '-'}\n"
            for rank, place in ranks
        ]
        stacks = [f"{head}{place['stacks']}" for head, (_, place) in zip(heads, ranks, strict=True)]
        with contextlib.suppress(OSError):  # it may be the disk that hangs or is full
            path.write_text("\n".join([said, "", *heads, "", *stacks]))
            write_end(self.run, EXIT_FAULT, said)
        with contextlib.suppress(RuntimeError):
            if self.store:
                self.store.set(f"{_KEY}/told", "")


def told(places: dict[int, dict[str, Any]], size: int) -> str:
    """In one sentence where the ranks are, those first that keep the others waiting.

    Args:
        places: of the ranks that have said it.
    """
    groups: dict[str, list[int]] = {}
    for rank, place in sorted(places.items()):
        groups.setdefault(_text(place), []).append(rank)
    # Who waits for nobody is waited for; else who is behind: of all that differ, the few.
    ordered = sorted(groups.items(), key=lambda group: (bool(places[group[1][0]]["collective"]), len(group[1])))
    parts = [f"{_names(ranks, places)}: {text}" for text, ranks in ordered[:4]]
    if missing := [rank for rank in range(size) if rank not in places]:
        parts.insert(0, f"{_names(missing, places)}: no answer")
    if len(ordered) > 4:
        parts.append(f"{len(ordered) - 4} other places")
    culprit = places[ordered[0][1][0]]
    still = min(place["still"] for place in places.values())
    samples = f", with the samples {brief(culprit['keys'])}" if culprit["keys"] and not culprit["reads"] else ""
    return f"step {culprit['step']} hangs, nothing has moved for {still:.0f} s: {'; '.join(parts)}{samples}"


def _text(place: dict[str, Any]) -> str:
    waits = f", waiting for {place['collective']}" if place["collective"] else ""
    reads = f", while {', '.join(place['reads'])}" if place["reads"] else ""
    return f"in {place['part']}, at {place['at']}{waits}{reads}"


def _names(ranks: Sequence[int], places: dict[int, dict[str, Any]]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}" + (f" ({places[ranks[0]]['host']})" if ranks[0] in places else "")
    return f"ranks {brief(list(map(str, ranks)))}"


def _main_thread() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _frames(frame: FrameType | None) -> list[FrameType]:
    """From the innermost to the outermost."""
    found = []
    while frame:
        found.append(frame)
        frame = frame.f_back
    return found


def _code(frames: Sequence[FrameType]) -> str:
    """The innermost line of ours or megatron-core's."""
    for frame in frames:
        name = frame.f_code.co_filename
        for room in ("/mmcore/", "/megatron/"):
            if room in name:
                return f"{room[1:]}{name.rpartition(room)[2]}:{frame.f_lineno} {frame.f_code.co_name}"
    return "the interpreter"


def _collective() -> str:
    """The oldest collective that this rank has begun and that is not done, or ""."""
    recorders: Any = torch._C._distributed_c10d
    dumps = (recorders._dump_nccl_trace_json, recorders._dump_fr_trace_json)
    for entry in [entry for dump in dumps for entry in json.loads(dump()).get("entries", [])]:
        if not entry["retired"] and entry["state"] != "completed":
            group = entry["process_group"][1]
            return f"{entry['profiling_name']} {entry['input_sizes']} number {entry['collective_seq_id']} of {group}"
    return ""


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )


def _bytes_written() -> str:
    """Of the process so far, files and pipes."""
    try:
        return next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("wchar"))
    except OSError:  # hidden in some containers
        return ""
