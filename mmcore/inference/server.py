"""The chat-completions protocol over HTTP: its routes, and what keeps them from being asked too much."""

import asyncio
import hmac
import ipaddress
import json
import secrets
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmcore.data.tokenizer import Tokenizer
from mmcore.inference import protocol
from mmcore.inference.desk import Desk, FullError, Ticket
from mmcore.inference.dialogue import Stripped, TooLongError, lay_out
from mmcore.inference.engine import Request as Asked
from mmcore.inference.protocol import Answer, ApiError, ChatRequest
from mmcore.inference.sampling import Sampling
from mmcore.models.architecture import Architecture

# Longest that a client may take to send a request.
BODY_SECONDS = 60.0
# Threads that decode pictures, each of which may need the memory of one of `image.MAX_PIXELS`.
NUM_READERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What is served to whom: the handlers of the protocol's routes."""

    desk: Desk
    model: str
    """Its name to clients."""
    created: int
    """When the checkpoint was written, in seconds since 1970."""
    tokenizer: Tokenizer
    architecture: Architecture
    end_ids: tuple[int, ...]
    max_length: int
    """Longest conversation and answer together, in tokens."""
    max_body_bytes: int
    max_image_bytes: int
    token: str
    """What clients have to show; nothing if empty."""
    host: str = ""
    """Name that the server was told to listen at. Without a token, and by no other name but an address or localhost,
    is it to be asked: a page in a browser can give this machine's address a name of its own (DNS rebinding)."""
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(NUM_READERS, "reader"))

    async def authorize(self, request: Request) -> None:
        if (
            not self.token
            and not _is_address(name := request.url.hostname or "")
            and name not in ("localhost", self.host)
        ):
            raise ApiError(403, f"the server is not known as {name!r}: ask it by its address, or start it with a token")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())  # a header's are bytes
        if self.token and not (is_right and scheme.lower() == "bearer"):
            what = "a wrong token" if given else "no token: send the header Authorization: Bearer TOKEN"
            raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def health(self) -> dict[str, Any]:
        return {"status": "ok", "model": self.model, "open_requests": self.desk.num_open}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._described()]}

    async def described(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return self._described()

    async def chat_completions(self, request: Request) -> Response:
        with ExitStack() as stack:
            ticket = stack.enter_context(closing(self._admit()))
            asked = protocol.read_request(await _read_body(request, self.max_body_bytes))
            self._check_model(asked.model)
            engine_request = await self._prepare(asked)
            ticket.ask(engine_request)
            num_prompt = len(engine_request.prompt.tokens)
            answer = Answer(id=f"chatcmpl-{uuid.uuid4().hex}", model=self.model)
            if asked.stream:
                has_usage = asked.stream_options is not None and asked.stream_options.include_usage
                events = _events(ticket, answer, num_prompt, has_usage)
                return _EventStream(events, on_end=stack.pop_all().close)
            return await _unless_gone(request, _whole(ticket, answer, num_prompt))

    def _admit(self) -> Ticket:
        try:
            return self.desk.admit()
        except FullError as full:
            raise ApiError(
                429,
                f"{self.desk.num_places} requests are open, which is the most: try again in {full.seconds} s",
                code="queue_full",
                headers={"Retry-After": str(full.seconds)},
            ) from None

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise ApiError(404, f"there is no model {name!r} here, only {self.model!r}", "model", "model_not_found")

    def _described(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.created, "owned_by": "mmcore"}

    async def _prepare(self, asked: ChatRequest) -> Asked:
        """What the engine is asked. Decoding and encoding are done by the readers: the loop has others to serve."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, self._engine_request, asked)

    def _engine_request(self, asked: ChatRequest) -> Asked:
        turns, files = protocol.read_messages(asked.messages, self.max_image_bytes)
        try:
            prompt = lay_out(turns, files, self.tokenizer, self.architecture, self.max_length)
        except TooLongError as error:
            raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None
        room = self.max_length - len(prompt.tokens)
        if asked.limit is not None and asked.limit > room:
            raise ApiError(
                400,
                f"the messages have {len(prompt.tokens)} tokens, pictures included, and the answer may have "
                f"{asked.limit}: together they must not have more than {self.max_length}",
                "max_completion_tokens" if asked.max_completion_tokens else "max_tokens",
                "context_length_exceeded",
            )
        sampling = Sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            repetition_penalty=asked.repetition_penalty,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        )
        return Asked(
            prompt=prompt,
            sampling=sampling,
            max_new_tokens=asked.limit or room,
            end_ids=self.end_ids,
            stop=tuple(asked.stop),
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _read_body(request: Request, limit: int) -> bytes:
    """
    Raises:
        ApiError: not JSON, larger than the limit, or too slow.
    """
    # No page of another site can send this type unasked: browsers ask the server first, which says no.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise ApiError(413, f"the request is larger than {limit} bytes", code="request_too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the request was not there after {BODY_SECONDS:.0f} s") from None


async def _whole(ticket: Ticket, answer: Answer, num_prompt: int) -> Response:
    text, num_answer, reason = "", 0, ""
    try:
        async for delta in ticket:
            text, num_answer, reason = text + delta.text, num_answer + len(delta.tokens), delta.finish_reason
    except Exception as error:
        raise _fault(error) from None
    return JSONResponse(answer.whole(text.strip(), reason, protocol.usage(num_prompt, num_answer)))


async def _events(ticket: Ticket, answer: Answer, num_prompt: int, has_usage: bool) -> AsyncIterator[str]:
    yield _event(answer.piece({"role": "assistant", "content": ""}))
    stripped, num_answer = Stripped(), 0
    try:
        async for delta in ticket:
            num_answer += len(delta.tokens)
            if text := stripped(delta.text):
                yield _event(answer.piece({"content": text}))
            if delta.finish_reason:
                yield _event(answer.piece({}, delta.finish_reason))
    except Exception as error:
        yield _event(_fault(error).body())
        return
    if has_usage:
        yield _event(answer.ending(protocol.usage(num_prompt, num_answer)))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _fault(error: Exception) -> ApiError:
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    return ApiError(500, "the engine has failed, and the server ends", code="engine_failed")


async def _unless_gone(request: Request, answering: Any) -> Response:
    """The response, unless the client goes away before it is there."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answering), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()


class _EventStream(StreamingResponse):
    """Server-sent events; whatever becomes of them, `on_end` is called."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end()


class _ReadFirst:
    """Reads what is left of a request before it is answered, and drops it.

    Else the connection would be closed while the client still sends, which it takes for a fault of the network, and
    never reads what is wrong.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_read = scope["type"] != "http"

        async def received() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body", False)
            return message

        async def rest() -> None:
            while not is_read:
                await received()

        async def sent(message: Message) -> None:
            nonlocal is_read
            with suppress(asyncio.TimeoutError):  # who is slow is not waited for
                await asyncio.wait_for(rest(), BODY_SECONDS)
            is_read = True
            await send(message)

        await self.app(scope, received, sent)


def build_app(service: Service) -> FastAPI:
    """The routes, and errors in the protocol's shape whatever they come from."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(_ReadFirst)
    app.add_api_route("/health", service.health)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(service.authorize)])
    v1.add_api_route("/models", service.models)
    v1.add_api_route("/models/{model:path}", service.described)
    v1.add_api_route("/chat/completions", service.chat_completions, methods=["POST"], response_model=None)
    app.include_router(v1)

    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    async def not_there(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, what).body(), error.status_code, error.headers)

    async def failed(_: Request, __: Exception) -> Response:
        return JSONResponse(ApiError(500, "a fault of the server, which its log tells of").body(), 500)

    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)

    handlers: dict[Any, Any] = {ApiError: refused, HTTPException: not_there, ClientDisconnect: gone, Exception: failed}
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    return app
