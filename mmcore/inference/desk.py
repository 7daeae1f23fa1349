"""Where requests meet the engine: what connections ask goes one way, pieces of answers the other.

Connections live in an event loop, the engine in another thread: each side has its methods here.
"""

import asyncio
import math
import queue
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext, suppress

from mmcore.inference.engine import Delta, Engine, Request
from mmcore.inference.standby import Standby


class FullError(Exception):
    """No place is free."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"no place is free; one may be in {seconds} s")
        self.seconds = seconds


class Ticket:
    """One request's place: among those that wait, then among those that are answered. `give` alone is the engine's."""

    def __init__(self, desk: "Desk") -> None:
        self.desk, self.loop = desk, asyncio.get_running_loop()
        self.deltas: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self.asked = 0.0
        self.is_closed = False

    def ask(self, request: Request) -> None:
        """Put the request to the engine, once."""
        self.asked = time.monotonic()
        self.desk.inbox.put((self, request))

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """The answer as it is written.

        Raises:
            ValueError: the engine refuses the request.
            Exception: the engine has failed.
        """
        while True:
            delta = await self.deltas.get()
            if isinstance(delta, Exception):
                raise delta
            yield delta
            if delta.finish_reason:
                return

    def give(self, delta: Delta | Exception) -> None:
        """From the engine's thread: the next piece, or why there is none."""
        with suppress(RuntimeError):  # the loop is closed: an operator did not want to wait
            self.loop.call_soon_threadsafe(self.deltas.put_nowait, delta)

    def close(self) -> None:
        """Give the place back; an answer that is not finished is wanted no more."""
        if self.is_closed:
            return
        self.is_closed = True
        self.desk.num_open -= 1
        if self.asked:
            self.desk.mean_seconds += 0.1 * (time.monotonic() - self.asked - self.desk.mean_seconds)
            self.desk.inbox.put((self, None))


class Desk:
    """All places."""

    def __init__(self, *, max_batch_size: int, max_waiting: int) -> None:
        """
        Args:
            max_batch_size: requests that the engine answers at once.
            max_waiting: more of them that wait; what comes then is sent away.
        """
        self.max_batch_size = max_batch_size
        self.num_places = max_batch_size + max_waiting
        self.num_open = 0
        self.mean_seconds = 1.0  # of recent requests
        self.inbox: queue.SimpleQueue[tuple[Ticket, Request | None] | None] = queue.SimpleQueue()
        self.running: dict[int, Ticket] = {}  # by the engine's id; the engine's thread alone looks at it

    def admit(self) -> Ticket:
        """Give away a place.

        Raises:
            FullError: there is none.
        """
        if self.num_open >= self.num_places:
            raise FullError(min(max(math.ceil(self.mean_seconds / self.max_batch_size), 1), 60))
        self.num_open += 1
        return Ticket(self)

    def end(self) -> None:
        """Let `work` return: no connection is left."""
        self.inbox.put(None)

    def work(self, engine: Engine, standby: Standby, on_fault: Callable[[], None]) -> None:
        """The engine's side, on the main rank: answer what is asked until the end.

        Args:
            on_fault: told when the engine has failed; what is asked from then on is refused.
        Raises:
            Exception: what the engine has failed with, after the end.
        """
        try:
            while asked := self.inbox.get():
                self._obey(engine, *asked)
                with nullcontext() if engine.is_idle else standby.awake():
                    while not engine.is_idle:
                        for delta in engine.step():
                            self.running[delta.id].give(delta)
                            if delta.finish_reason:
                                del self.running[delta.id]
                        self._catch_up(engine)
        except Exception as error:
            for ticket in self.running.values():
                ticket.give(error)
            on_fault()
            while asked := self.inbox.get():
                asked[0].give(error)
            raise

    def _catch_up(self, engine: Engine) -> None:
        """Obey whatever has been asked meanwhile."""
        with suppress(queue.Empty):
            while asked := self.inbox.get_nowait():
                self._obey(engine, *asked)
            for id in self.running:  # the end, which did not wait for them
                engine.cancel(id)
            self.inbox.put(None)

    def _obey(self, engine: Engine, ticket: Ticket, request: Request | None) -> None:
        if request is None:
            for id in [id for id, other in self.running.items() if other is ticket]:
                engine.cancel(id)
            return
        try:
            self.running[engine.add(request)] = ticket
        except ValueError as error:
            ticket.give(error)
