"""Connections and the engine side by side, until a signal ends them.

The event loop with its connections has a thread of its own. The main thread, where the model was made, runs the
engine: see `mmcore.inference.desk`.
"""

import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from mmcore.inference.engine import Engine
from mmcore.inference.server import Service, build_app
from mmcore.inference.standby import Standby

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "said": {"format": "%(asctime)s %(message)s"},
        "access": {
            "()": "uvicorn.logging.AccessFormatter",
            "fmt": '%(asctime)s %(client_addr)s "%(request_line)s" %(status_code)s',
            "use_colors": False,
        },
    },
    "handlers": {
        "said": {"class": "logging.StreamHandler", "formatter": "said"},  # to stderr, as is the other
        "access": {"class": "logging.StreamHandler", "formatter": "access"},
    },
    "loggers": {
        "uvicorn.error": {"handlers": ["said"], "level": "WARNING", "propagate": False},
        "uvicorn.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
    },
}


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()


def serve(
    service: Service,
    engine: Engine,
    standby: Standby,
    listener: socket.socket,
    on_started: Callable[[], None] = lambda: None,
) -> None:
    """On the main rank and thread: serve until a signal asks for the end, then finish what is open.

    A second signal does not wait for that.

    Raises:
        Exception: what the engine has failed with.
    """
    config = uvicorn.Config(build_app(service), log_config=LOGGING, server_header=False)
    server = _Server(config, on_started)

    def stop(*_: Any) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            service.desk.end()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=run, name="connections")
    thread.start()
    try:
        service.desk.work(engine, standby, on_fault=stop)
    finally:
        thread.join()
        service.readers.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
    if not server.started:
        raise RuntimeError("the server did not start: what its thread has failed with is told above")
