"""What goes wrong between connections and the engine: what goes right is tests/inference/test_server.py's."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from mmcore.inference.desk import Desk, FullError
from mmcore.inference.engine import Delta


class Engine:
    """Each answer is three steps long, if nothing keeps the engine from it."""

    def __init__(self, fails_at: int = -1) -> None:
        self.left: dict[int, int] = {}
        self.cancelled: list[int] = []
        self.steps, self.fails_at, self.count = 0, fails_at, 0

    @property
    def is_idle(self) -> bool:
        return not self.left

    def add(self, request: Any) -> int:
        if request == "refused":
            raise ValueError("there is no room")
        self.count += 1
        self.left[self.count] = 3 if request == "short" else 1 << 30
        return self.count

    def cancel(self, id: int) -> None:
        if id in self.left and id not in self.cancelled:
            self.cancelled.append(id)
            self.left[id] = 0

    def step(self) -> list[Delta]:
        if self.steps == self.fails_at:
            raise RuntimeError("out of memory")
        self.steps += 1
        deltas = []
        for id, left in list(self.left.items()):
            self.left[id] = left - 1
            reason: Any = "cancelled" if left <= 0 else "stop" if left == 1 else ""
            deltas.append(Delta(id=id, text="x", finish_reason=reason))
            if reason:
                del self.left[id]
        return deltas


class Standby:
    def awake(self) -> AbstractContextManager[None]:
        return nullcontext()


def run(talk: Callable[[Desk], Coroutine[Any, Any, None]], engine: Engine, **places: int) -> tuple[list[str], int]:
    """Let connections talk while the engine works.

    Returns:
        What the engine's side raised, and how often it told of a fault.
    """
    desk = Desk(**{"max_batch_size": 2, "max_waiting": 2, **places})
    raised: list[str] = []
    faults: list[None] = []

    def work() -> None:
        try:
            desk.work(engine, Standby(), lambda: faults.append(None))  # type: ignore[arg-type]
        except Exception as error:
            raised.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        asyncio.run(asyncio.wait_for(talk(desk), 10))
    finally:
        desk.end()
        thread.join(10)
    assert not thread.is_alive()
    return raised, len(faults)


async def answer(desk: Desk, request: Any) -> str:
    ticket = desk.admit()
    try:
        ticket.ask(request)
        return "".join([delta.text async for delta in ticket])
    finally:
        ticket.close()


def test_what_the_engine_refuses_is_told_to_who_asked_alone() -> None:
    async def talk(desk: Desk) -> None:
        told = await asyncio.gather(
            answer(desk, "short"), answer(desk, "refused"), answer(desk, "short"), return_exceptions=True
        )
        assert told[0] == told[2] == "xxx" and str(told[1]) == "there is no room"
        assert desk.num_open == 0

    assert run(talk, Engine()) == ([], 0)


def test_a_fault_ends_what_runs_and_what_comes() -> None:
    async def talk(desk: Desk) -> None:
        told = await asyncio.gather(answer(desk, "long"), answer(desk, "long"), return_exceptions=True)
        assert [str(error) for error in told] == ["out of memory"] * 2
        with pytest.raises(RuntimeError, match="out of memory"):
            await answer(desk, "short")
        assert desk.num_open == 0

    assert run(talk, Engine(fails_at=5)) == (["out of memory"], 1)


def test_the_end_does_not_wait_for_answers() -> None:
    engine = Engine()

    async def talk(desk: Desk) -> None:
        ticket = desk.admit()
        ticket.ask("long")
        await ticket.deltas.get()

    assert run(talk, engine) == ([], 0)
    assert engine.cancelled == [1] and engine.is_idle


def test_who_goes_away_is_answered_no_more() -> None:
    engine = Engine()

    async def talk(desk: Desk) -> None:
        tickets = [desk.admit() for _ in range(3)]
        for ticket in tickets:
            ticket.ask("long")
        await tickets[0].deltas.get()
        tickets[1].close()
        tickets[1].close()  # twice is once
        assert desk.num_open == 2
        while engine.cancelled != [2]:
            await asyncio.sleep(0.001)
        assert not (await tickets[2].deltas.get()).finish_reason  # type: ignore[union-attr]

    assert run(talk, engine) == ([], 0)


def test_places_are_counted() -> None:
    async def talk(desk: Desk) -> None:
        desk.mean_seconds = 25.0
        tickets = [desk.admit() for _ in range(4)]
        with pytest.raises(FullError) as caught:
            desk.admit()
        assert caught.value.seconds == 13  # two are answered at once, each in 25 s
        tickets[0].close()
        desk.admit()

    assert run(talk, Engine()) == ([], 0)
