"""OpenAI's chat-completions protocol: what a request may say, and how answers and errors are written.

What this server cannot do is refused by its name: nothing that was asked is left out silently.

Source: OpenAI's API reference, "Create chat completion", and the types of its Python client (openai 3.57,
openai/types/chat). `top_k` and `repetition_penalty` are not in it; vLLM and others have them by these names.
"""

import base64
import binascii
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmcore.constants import IMAGE_TAG
from mmcore.data.templates import Role, Turn

# What these stand for is what the server does anyhow, so that clients may spell it out.
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "store": False,
    "tool_choice": "none",
    "tools": [],
}

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


@dataclass(eq=False)
class ApiError(Exception):
    """What a client is told in place of an answer."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    """Takes no text for a number, and no key that it does not know; null is the same as nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """One request, checked."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] = []
    user: str = ""
    """Who asks, which changes no answer."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if key not in NEUTRAL or item != NEUTRAL[key]}

    @field_validator("temperature")
    @classmethod
    def _finite(cls, value: float) -> float:
        """Logits are divided by it."""
        if 0 < value < 1e-3:
            raise ValueError("is 0 for the most probable token, or at least 0.001")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens, where one is given."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes) -> ChatRequest:
    """Read a request.

    Raises:
        ApiError: 400, with the parameter at fault.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    if request.stream_options and not request.stream:
        raise ApiError(400, "'stream_options' is for 'stream': true", "stream_options")
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        raise ApiError(400, "'max_tokens' and 'max_completion_tokens' are the same: give one of them", "max_tokens")
    return request


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong, said in the protocol's names."""
    first = error.errors(include_url=False)[0]
    # Among the places are the tags of unions, which are no keys: a message's part "text" or "image_url".
    where = [part for index, part in enumerate(first["loc"]) if not _is_tag(first["loc"], index)]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({first['ctx']['error']})", code="invalid_json")
    if first["type"] == "extra_forbidden":
        neutral = f", but for {json.dumps(NEUTRAL[param])}" if param in NEUTRAL else ""
        return ApiError(400, f"the parameter {param!r} is not supported{neutral}", param, "unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"the parameter {param!r} is missing", param, "missing_required_parameter")
    told = first["msg"].removeprefix("Value error, ")
    message = f"{param or 'the body'}: {told[:1].lower()}{told[1:]}"
    given = first["input"]
    message += f", not {given!r:.60}" if isinstance(given, str | int | float) else ""
    return ApiError(400, message, param or None)


def _is_tag(loc: tuple[int | str, ...], index: int) -> bool:
    return index > 1 and isinstance(loc[index - 1], int) and loc[index - 2] == "content"


def read_messages(messages: list[Message], max_image_bytes: int) -> tuple[list[Turn], list[bytes]]:
    """Turns with a tag for each picture, and the pictures' files; parts of a message are joined by line breaks.

    So a picture before or behind its question stands as in LLaVA's training data.

    Raises:
        ApiError: 400; see `_read_picture`, or a text holds an image tag.
    """
    turns: list[Turn] = []
    pictures: list[bytes] = []
    for number, message in enumerate(messages):
        texts = []
        for place, part in enumerate(message.content):
            where = f"messages[{number}].content[{place}]"
            if isinstance(part, TextPart):
                if IMAGE_TAG in part.text and message.role != "assistant":  # what the model wrote is text
                    raise ApiError(400, f"{IMAGE_TAG} stands for a picture: give pictures as image_url parts", where)
                texts.append(part.text)
            elif message.role != "user":
                raise ApiError(400, f"a picture in a message of the {message.role}: only the user has pictures", where)
            else:
                pictures.append(_read_picture(part.image_url.url, f"{where}.image_url.url", max_image_bytes))
                texts.append(IMAGE_TAG)
        role: Role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, "\n".join(texts)))
    return turns, pictures


def _read_picture(url: str, where: str, max_bytes: int) -> bytes:
    """Content of a picture's file, not decoded.

    Raises:
        ApiError: 400; a remote address, not a base64 data URL of a picture, or too large.
    """
    head = _DATA_URL.match(url[:100])
    if head is None:
        what = "remote pictures are not fetched" if re.match(r"(?i)[a-z]+://", url) else "not a picture's data URL"
        raise ApiError(400, f"{what}: give data:image/png;base64,... ({url[:40]!r})", where, "invalid_image_url")
    num_bytes = (len(url) - head.end()) * 3 // 4 - url[-2:].count("=")
    if num_bytes > max_bytes:
        raise ApiError(400, f"a picture of {num_bytes} bytes; at most {max_bytes} are taken", where, "image_too_large")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"a picture that is not base64 ({error})", where, "invalid_base64_image") from None


def usage(num_prompt: int, num_answer: int) -> dict[str, int]:
    """Tokens of a request, image embeddings included."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": num_prompt + num_answer}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Writes one answer, whole or in pieces."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    def whole(self, text: str, finish_reason: str, used: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._written("chat.completion", message=message, finish_reason=finish_reason) | {"usage": used}

    def piece(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        return self._written("chat.completion.chunk", delta=delta, finish_reason=finish_reason)

    def ending(self, used: dict[str, int]) -> dict[str, Any]:
        """What a stream ends with where its usage is asked for."""
        return self._written("chat.completion.chunk") | {"choices": [], "usage": used}

    def _written(self, kind: str, **choice: Any) -> dict[str, Any]:
        choices = [{"index": 0, **choice, "logprobs": None}]
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
