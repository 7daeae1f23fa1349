"""What a request may say. That real clients are answered is tests/inference/test_server.py's."""

import base64
import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage

from mmcore.data.templates import Turn
from mmcore.inference.protocol import ApiError, ChatRequest, read_messages, read_request
from tests.data.fabricated import picture

USER = {"role": "user", "content": "Hi"}


def request(**given: Any) -> ChatRequest:
    return read_request(json.dumps({"model": "m", "messages": [USER], **given}).encode())


def refusal(**given: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        request(**given)
    assert caught.value.status == 400
    return caught.value


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def test_what_is_not_given_is_the_protocols_default() -> None:
    asked = request()
    assert (asked.temperature, asked.top_p, asked.limit, asked.stop, asked.seed) == (1.0, 1.0, None, [], None)
    assert not asked.stream and asked.stream_options is None


def test_null_and_what_changes_nothing_is_taken() -> None:
    neutral = {"n": 1, "tools": [], "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0}
    asked = request(**neutral, response_format={"type": "text"}, user="me", seed=None, audio=None)
    assert asked == request(user="me")


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"n": 2}, "n", "the parameter 'n' is not supported, but for 1"),
        ({"logprobs": True}, "logprobs", "'logprobs' is not supported, but for false"),
        ({"tools": [{"type": "function"}]}, "tools", "'tools' is not supported, but for []"),
        ({"response_format": {"type": "json_object"}}, "response_format", 'but for {"type": "text"}'),
        ({"guided_json": {}}, "guided_json", "the parameter 'guided_json' is not supported"),
        ({"messages": [{**USER, "name": "me"}]}, "messages[0].name", "'messages[0].name' is not supported"),
        ({"temperature": "1"}, "temperature", "a valid number, not '1'"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2, not 2.5"),
        ({"temperature": 1e-9}, "temperature", "or at least 0.001, not 1e-09"),
        ({"temperature": float("nan")}, "temperature", "finite number"),
        ({"top_p": 0}, "top_p", "greater than 0, not 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, not 0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one of them"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop[0]", "at least 1 character"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is for 'stream': true"),
        ({"seed": 1 << 70}, "seed", "less than"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "Hi"}, "messages", "valid array"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "'messages[0].content' is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "not 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]", "'audio'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "is missing",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]}
                ]
            },
            "messages[0].content[0].image_url.detail",
            "should be 'auto', not 'low'",
        ),
    ],
)
def test_refusals_name_the_parameter(given: dict[str, Any], param: str, message: str) -> None:
    error = refusal(**given)
    assert error.param == param and message in error.message
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff"])
def test_a_body_that_is_no_json(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not JSON") as caught:
        read_request(body)
    assert caught.value.code == "invalid_json"


def test_turns_and_pictures() -> None:
    """A picture stands where it is, on a line of its own: as in LLaVA's data."""
    files = [picture(seed) for seed in range(3)]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [image(files[0]), {"type": "text", "text": "What?"}]},
        ChatCompletionMessage(role="assistant", content="An <image>.").model_dump(),  # as a client hands it back
        {"role": "user", "content": [{"type": "text", "text": "And?"}, image(files[1]), image(files[2])]},
    ]
    turns, pictures = read_messages(request(messages=messages).messages, max_image_bytes=10_000)
    assert turns == [
        Turn("system", "Be brief."),
        Turn("user", "<image>\nWhat?"),
        Turn("assistant", "An <image>."),
        Turn("user", "And?\n<image>\n<image>"),
    ]
    assert pictures == files


@pytest.mark.parametrize(
    ("message", "where", "told"),
    [
        ({"role": "user", "content": "Is <image> it?"}, "[0]", "give pictures as image_url parts"),
        ({"role": "assistant", "content": [image(b"x")]}, "[0]", "only the user has pictures"),
        ({"role": "user", "content": [image(b"x" * 200)]}, "[0].image_url.url", "200 bytes; at most 100"),
        *(
            (
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]},
                "[0].image_url.url",
                told,
            )
            for url, told in [
                ("http://127.0.0.1/secret.png", "remote pictures are not fetched"),
                ("file:///etc/passwd", "remote pictures are not fetched"),
                ("/etc/passwd", "not a picture's data URL"),
                ("data:text/html;base64,AAAA", "not a picture's data URL"),
                ("data:image/png;base64,AA", "not base64"),
                ("data:image/png;base64,A\nAAA", "not base64"),
            ]
        ),
    ],
)
def test_messages_that_cannot_be_taken(message: dict[str, Any], where: str, told: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_messages(request(messages=[message]).messages, max_image_bytes=100)
    assert caught.value.status == 400 and told in caught.value.message
    assert caught.value.param == f"messages[0].content{where}"
