"""`mmcore serve --checkpoint DIR`: answer OpenAI's chat-completions protocol over HTTP."""

import ipaddress
import os
import signal
import socket
import sys
from dataclasses import dataclass

import tyro

from mmcore.constants import EXIT_DONE, MODEL_FILE
from mmcore.inference.loading import ModelConfig, Source, check, loaded

TOKEN_VARIABLE = "MMCORE_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(ModelConfig):
    """Answer OpenAI's chat-completions protocol: any of its clients, with http://HOST:PORT/v1 as base URL.

    Messages of text and pictures (as data URLs), streaming or not. SIGTERM finishes what is open.
    """

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one of this machine, also from outside."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    model_name: str = ""
    """Name of the model to clients; the checkpoint folder's if empty."""
    token: str = ""
    """Bearer token that clients must show. Better in the environment, as MMCORE_TOKEN: others can read options."""
    max_batch_size: int = 8
    """Most requests that are answered at once."""
    max_waiting: int = 64
    """Most requests that wait for that; what comes then is told to try again later."""
    max_request_mb: float = 32.0
    """Largest request, its pictures included (base64 makes them a third larger)."""
    max_image_mb: float = 16.0
    """Largest file of a picture."""

    def __post_init__(self) -> None:
        super(ServeConfig, self).__post_init__()  # by its names: slots=True makes another class of this one
        for name in ("max_batch_size", "max_request_mb", "max_image_mb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        if self.max_waiting < 0:
            raise ValueError(f"--max-waiting must not be negative, but is {self.max_waiting}")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"--port must be from 0 to 65535, not {self.port}")


def main(argv: list[str]) -> int:
    config = tyro.cli(ServeConfig, prog="mmcore serve", args=argv)
    source = check(config)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'mmcore[serve]'") from None
    if int(os.environ.get("RANK", 0)) == 0:
        token = config.token or os.environ.get(TOKEN_VARIABLE, "")
        with bound(config.host, config.port) as listener:
            if not token and not is_local(config.host):
                print(
                    f"mmcore serve: whoever reaches {config.host} may use the model: set {TOKEN_VARIABLE} to a token "
                    "that they must show, or leave --host out to stay on this machine",
                    file=sys.stderr,
                )
            lead(config, source, token, listener)
    else:
        follow(config, source)
    return EXIT_DONE


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address: who connects while the model is loaded has to wait, and finds it then.

    Raises:
        ValueError: the address is not this machine's, or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be listened at ({error.strerror}): give others") from None
    return listener


def lead(config: ServeConfig, source: Source, token: str, listener: socket.socket) -> None:
    """The main rank: serve until a signal ends it."""
    from mmcore.inference.desk import Desk
    from mmcore.inference.server import Service
    from mmcore.inference.serving import serve

    with loaded(config, source, config.max_batch_size) as model:
        service = Service(
            desk=Desk(max_batch_size=config.max_batch_size, max_waiting=config.max_waiting),
            model=config.model_name or config.checkpoint.resolve().name,
            created=int((source.folder / MODEL_FILE).stat().st_mtime),
            tokenizer=model.tokenizer,
            architecture=source.architecture,
            end_ids=model.end_ids,
            max_length=source.max_length,
            max_body_bytes=int(config.max_request_mb * 1e6),
            max_image_bytes=int(config.max_image_mb * 1e6),
            token=token,
            host=config.host,
        )
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        serve(
            service,
            model.engine,
            model.standby,
            listener,
            on_started=lambda: print(f"serving {service.model} at http://{address}/v1", flush=True),
        )


def follow(config: ServeConfig, source: Source) -> None:
    """Another rank: work with the main one, which alone is told when to end (torchrun tells all)."""
    with loaded(config, source, config.max_batch_size) as model:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        model.standby.follow()
