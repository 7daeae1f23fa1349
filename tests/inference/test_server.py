"""`mmcore serve` as OpenAI's own client meets it: a process on loopback, with a tiny model."""

import asyncio
import base64
import http.client
import io
import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from PIL import Image
from starlette.requests import Request

from mmcore.data.templates import Turn
from mmcore.inference.engine import Delta, Engine
from mmcore.inference.protocol import ApiError
from mmcore.inference.server import Service
from tests import answering
from tests.answering import Command
from tests.data.fabricated import picture

PICTURES = [picture(seed) for seed in range(2)]
TOKEN = "a token"
NEW = 12
ENDLESS: dict[str, Any] = {"max_completion_tokens": 3000, "extra_body": {"repetition_penalty": answering.ENDLESS}}


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content) if len(content) > 1 else content[0]}


# By name: messages, and what they have to be to the model.
TALKS: dict[str, tuple[list[Any], list[Turn], list[bytes]]] = {
    "text": ([user("What is it?")], [Turn("user", "What is it?")], []),
    "picture": (
        [user(image(PICTURES[0]), text("What is it?"))],
        [Turn("user", "<image>\nWhat is it?")],
        PICTURES[:1],
    ),
    "another picture": (
        [user(image(PICTURES[1]), text("What is it?"))],
        [Turn("user", "<image>\nWhat is it?")],
        PICTURES[1:],
    ),
    "turns": (
        [
            {"role": "system", "content": "Be brief."},
            user(text("Is"), image(PICTURES[0]), text("like"), image(PICTURES[1])),
            {"role": "assistant", "content": "A cat."},
            user("Why?"),
        ],
        [
            Turn("system", "Be brief."),
            Turn("user", "Is\n<image>\nlike\n<image>"),
            Turn("assistant", "A cat."),
            Turn("user", "Why?"),
        ],
        PICTURES,
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.write_checkpoint(tmp_path_factory.mktemp("server") / "tiny")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, tuple[str, int]]:
    """Answers of the engine by itself, one by one, and lengths of prompts."""
    talks = [(turns, files) for _, turns, files in TALKS.values()]
    found = dict(zip(TALKS, answering.engine_answers(checkpoint, talks, NEW), strict=True))
    assert len(set(found.values())) == len(TALKS), "answers are alike: the test would see nothing"
    return found


@contextmanager
def serving(checkpoint: Path, *options: object, **environment: str) -> Iterator[tuple[Command, int]]:
    """A server, and its port."""
    arguments = ("serve", "--checkpoint", checkpoint, "--port", 0, *options)
    command = Command(checkpoint.parent, *arguments, environment=environment)
    try:
        yield command, int(command.wait_for(r"serving \S+ at http://[\d.]+:(\d+)/v1")[1])
    finally:
        if command.status is None:
            command.kill()
        command.end()


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[tuple[Command, int]]:
    limits = ("--max-batch-size", 3, "--max-waiting", 4, "--max-request-mb", 0.5, "--max-image-mb", 0.1)
    with serving(checkpoint, *limits, MMCORE_TOKEN=TOKEN) as running:
        yield running


def client_of(port: int, token: str = TOKEN) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def client(server: tuple[Command, int]) -> openai.OpenAI:
    return client_of(server[1])


Ask = Callable[..., Any]


def asker(client: openai.OpenAI) -> Ask:
    def ask(messages: Any = TALKS["text"][0], **options: Any) -> Any:
        options = {"model": "tiny", "temperature": 0, "max_completion_tokens": NEW, **options}
        return client.chat.completions.create(messages=messages, **options)

    return ask


@pytest.fixture(scope="module")
def ask(client: openai.OpenAI) -> Ask:
    return asker(client)


def content(answer: Any) -> str:
    return answer.choices[0].message.content


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "mmcore")
    assert client.models.retrieve("tiny") == model and time.time() - model.created < 1000
    with pytest.raises(openai.NotFoundError, match="there is no model 'large' here, only 'tiny'"):
        client.models.retrieve("large")


@pytest.mark.parametrize("name", TALKS)
def test_answers_are_the_engines(ask: Ask, expected: dict[str, tuple[str, int]], name: str) -> None:
    answer = ask(TALKS[name][0])
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (expected[name][0], "assistant")
    assert choice.finish_reason == "length" and answer.model == "tiny"
    length = expected[name][1]
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (length, NEW, length + NEW)


@pytest.mark.parametrize("name", TALKS)
def test_a_stream_is_the_answer_in_pieces(ask: Ask, expected: dict[str, tuple[str, int]], name: str) -> None:
    chunks = list(ask(TALKS[name][0], stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.object, chunk.model) for chunk in chunks}) == 1
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    texts = [piece.choices[0].delta.content or "" for piece in pieces]
    assert "".join(texts) == expected[name][0] and len([part for part in texts if part]) >= 3
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert not last.choices and last.usage.completion_tokens == NEW and last.usage.prompt_tokens == expected[name][1]


def test_a_stream_without_usage_ends_with_its_reason(ask: Ask) -> None:
    *_, last = ask(stream=True)
    assert last.choices[0].finish_reason == "length" and last.usage is None


def test_many_at_once_get_what_each_gets_alone(ask: Ask, expected: dict[str, tuple[str, int]]) -> None:
    """More than run at once, in every kind and both ways."""
    jobs = [(name, stream) for name in TALKS for stream in (False, True)][:7]

    def run(job: tuple[str, bool]) -> str:
        name, stream = job
        if not stream:
            return content(ask(TALKS[name][0]))
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(TALKS[name][0], stream=True))

    with ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(2):
            assert list(pool.map(run, jobs)) == [expected[name][0] for name, _ in jobs]


def test_stop_texts_end_an_answer(ask: Ask, expected: dict[str, tuple[str, int]]) -> None:
    whole = expected["text"][0]
    stop = whole[5:8]
    for given in (stop, ["nowhere", stop]):
        answer = ask(stop=given)
        assert content(answer) == whole[: whole.index(stop)].strip()
        assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < NEW


def test_sampling(ask: Ask, expected: dict[str, tuple[str, int]]) -> None:
    drawn = [content(ask(temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({content(ask(temperature=None)) for _ in range(3)}) == 3  # by default it is 1, with another seed each
    for narrow in ({"top_p": 1e-9}, {"extra_body": {"top_k": 1}}):
        assert content(ask(temperature=1.5, **narrow)) == expected["text"][0]
    assert content(ask(extra_body={"repetition_penalty": 0.01})) != expected["text"][0]  # it says what it was told


def test_the_longest_answer_is_what_there_is_room_for(ask: Ask, expected: dict[str, tuple[str, int]]) -> None:
    length, most = expected["text"][1], answering.MAX_LENGTH
    with pytest.raises(openai.BadRequestError, match=f"must not have more than {most}") as caught:
        ask(max_completion_tokens=most - length + 1)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "max_completion_tokens"
    with pytest.raises(openai.BadRequestError, match=f"{most - 1} leave room for an answer") as caught:
        ask([user("What? " * most)])
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    assert len(content(ask(max_completion_tokens=None, max_tokens=2))) < len(expected["text"][0])


def bomb() -> bytes:
    """A picture of more pixels than are decoded, in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "large"}, 404, "there is no model 'large' here, only 'tiny'"),
        ({"n": 2}, 400, "'n' is not supported, but for 1"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "'tools' is not supported"),
        ({"temperature": 3}, 400, "less than or equal to 2"),
        ({"messages": [user("Is <image> it?")]}, 400, "give pictures as image_url parts"),
        ({"messages": [user("Q"), user("R")]}, 400, "a question last; these turns are of: user, user"),
        ({"messages": [user(text("Q"), image(b"no picture"))]}, 400, "picture 1: not a picture"),
        ({"messages": [user(text("Q"), image(PICTURES[0][:400]))]}, 400, "a broken PNG picture"),
        ({"messages": [user(text("Q"), image(bomb()))]}, 400, "picture 1: a picture of 9000 x 9000 pixels"),
        ({"messages": [user(text("Q"), image(bytes(200_000)))]}, 400, "200000 bytes; at most 100000"),
        ({"messages": [user("x" * 600_000)]}, 413, "the request is larger than 500000 bytes"),
        ({"messages": [user("x" * 9_000_000)]}, 413, "the request is larger than 500000 bytes"),
    ],
)
def test_mistakes_are_told(ask: Ask, options: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(**options)
    error = caught.value
    assert error.status_code == status and message in error.message
    assert error.type == "invalid_request_error" and set(error.body or ()) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("token", ["", "another", TOKEN[:-1], f"{TOKEN}x", "Gr\u00fc\u00dfe \u732b"])
def test_a_wrong_token_is_refused_before_anything_is_read(server: tuple[Command, int], token: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server[1], timeout=30)
    headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
        connection.request(method, path, body=b"x" * (1 << 20), headers=headers)
        response = connection.getresponse()
        told = json.loads(response.read())["error"]
        assert response.status == 401 and response.headers["WWW-Authenticate"] == "Bearer"
        assert told["code"] == "invalid_api_key" and ("wrong" if token else "no token") in told["message"]


@pytest.mark.parametrize(
    ("method", "path", "kind", "status"),
    [
        ("GET", "/v1/chat/completions", "application/json", 405),
        ("POST", "/v1/completions", "application/json", 404),
        ("GET", "/docs", "application/json", 404),
        ("POST", "/v1/chat/completions", "text/plain", 415),  # as another site's page can send it
    ],
)
def test_other_requests(server: tuple[Command, int], method: str, path: str, kind: str, status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server[1], timeout=30)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
    connection.request(method, path, body=b"{}", headers=headers)
    response = connection.getresponse()
    assert response.status == status and set(json.loads(response.read())["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


def health(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())


def wait_until_idle(port: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while health(port)["open_requests"]:
        assert time.monotonic() < deadline, health(port)
        time.sleep(0.02)


def test_a_full_server_sends_away_and_gone_clients_give_their_places_back(
    server: tuple[Command, int], ask: Ask
) -> None:
    """Each answer would take half a minute, and seven are as many as there are places."""
    port = server[1]
    wait_until_idle(port, 5)
    streams = [ask(**ENDLESS, stream=True) for _ in range(5)]
    for stream in streams[:3]:
        assert next(stream).choices[0].delta.role == "assistant"
    asked = {"model": "tiny", "messages": [user("What?")], "max_tokens": 3000}
    body = json.dumps({**asked, "repetition_penalty": answering.ENDLESS})
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=30) for _ in range(2)]
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", body, headers)
    while health(port)["open_requests"] < 7:
        time.sleep(0.02)
    with pytest.raises(openai.RateLimitError, match="7 requests are open, which is the most") as caught:
        ask()
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60 and caught.value.code == "queue_full"
    for stream in streams:
        stream.close()
    for connection in connections:
        connection.close()
    wait_until_idle(port, 10)
    assert content(ask())  # the engine too has let them go


def test_a_signal_lets_answers_end(checkpoint: Path) -> None:
    """What runs and what waits; nobody new is let in. And whoever is open to the network is warned."""
    options = ("--max-batch-size", 1, "--host", "0.0.0.0", "--model-name", "mine")
    with serving(checkpoint, *options) as (command, port):
        assert "whoever reaches 0.0.0.0 may use the model: set MMCORE_TOKEN" in command.errors
        ask = asker(client_of(port, "none"))
        stream = ask(**{**ENDLESS, "model": "mine", "max_completion_tokens": 300}, stream=True)
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, model="mine", max_completion_tokens=5)
            while health(port)["open_requests"] < 2:
                time.sleep(0.01)
            command.kill(signal.SIGTERM)
            chunks = list(stream)
            assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) > 20
            assert waiting.result().usage.completion_tokens == 5
        with pytest.raises(openai.APIConnectionError):
            ask(model="mine")
        assert command.end() == 0 and "Traceback" not in command.errors


def test_a_second_signal_does_not_wait(checkpoint: Path) -> None:
    with serving(checkpoint) as (command, port):
        stream = asker(client_of(port, "none"))(**ENDLESS, stream=True)
        next(stream)
        command.kill(signal.SIGINT)
        time.sleep(0.3)
        command.kill(signal.SIGINT)
        assert command.end(timeout=10) == 0


def test_a_fault_of_the_engine_is_told_and_ends_the_server(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def fail(engine: Engine) -> list[Delta]:
        if any(answer.count == 5 for answer in engine.running):
            raise ValueError("out of luck")
        return step(engine)

    monkeypatch.setattr(Engine, "step", fail)  # the server is a fork of this process
    with serving(checkpoint) as (command, port):
        ask = asker(client_of(port, "none"))
        assert ask(max_completion_tokens=2).usage.completion_tokens == 2
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(ask)
            with pytest.raises(openai.APIError, match="the engine has failed, and the server ends"):
                list(ask(stream=True))
            with pytest.raises(openai.InternalServerError, match="the engine has failed, and the server ends"):
                whole.result()
        assert command.end() == 1 and "RuntimeError: the engine has failed: out of luck" in command.errors


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_ranks_answer_together(checkpoint: Path, expected: dict[str, tuple[str, int]], layout: str) -> None:
    """The first serves, the others work with it; a signal to all of them, as torchrun sends it, ends all well."""
    arguments = ("serve", "--checkpoint", checkpoint, "--port", 0, f"--{layout}-model-parallel-size", 2)
    commands = [
        Command(checkpoint.parent, *arguments, environment=environment) for environment in answering.rank_environment(2)
    ]
    try:
        port = int(commands[0].wait_for(r"serving tiny at http://127.0.0.1:(\d+)/v1")[1])
        ask = asker(client_of(port, "none"))
        for name in ("turns", "picture"):
            assert content(ask(TALKS[name][0])) == expected[name][0]
            time.sleep(0.2)  # idle in between
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, [messages for messages, *_ in TALKS.values()]))
        assert [content(answer) for answer in answers] == [expected[name][0] for name in TALKS]
        for command in reversed(commands):
            command.kill(signal.SIGTERM)
        assert [command.end() for command in commands] == [0, 0]
        assert not commands[1].output
    finally:
        for command in commands:
            command.end(timeout=0)


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("localhost", True),
        ("gpu.lab:8000", True),
        ("evil.example:8000", False),
        ("", False),
    ],
)
def test_without_a_token_the_server_has_no_name_that_others_gave_it(host: str, is_known: bool) -> None:
    scope = {"type": "http", "path": "/", "query_string": b"", "headers": [(b"host", host.encode())], "server": None}
    service: Any = SimpleNamespace(token="", host="gpu.lab")
    asked = Service.authorize(service, Request(scope))
    if is_known:
        asyncio.run(asked)
    else:
        with pytest.raises(ApiError, match="ask it by its address"):
            asyncio.run(asked)
