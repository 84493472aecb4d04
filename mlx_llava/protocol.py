"""What OpenAI's clients send, checked (platform.openai.com/docs/api-reference).

A parameter is honoured or refused by its name. Ignored are those that ask nothing of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from mlx_llava.decoding import Options
from mlx_llava.structured import ANY_OBJECT

#: Parameters that can only have the values that change nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "verbosity": ("medium",),
    "web_search_options": (),
}
#: Parameters that ask nothing of the answer. Tools are offers, which no LLaVA takes: that one
#: must be called, is refused with `tool_choice`.
IGNORED = frozenset(
    ("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "tools", "user")
)
#: What OpenAI's answers hold beside text; clients send it back within the conversation.
NO_TEXT = ("annotations", "audio", "function_call", "refusal", "tool_calls")
RETRY_SECONDS = 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_SCHEMA_LENGTH = 100_000
MAX_MESSAGES = 1000
MAX_PROMPTS = 64
DEFAULT_COMPLETION_TOKENS = 16


class ApiError(Exception):
    """What is answered in place of an answer.

    Attributes:
        status: of HTTP.
        headers: further ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self._fields = {"message": message, "type": kind, "param": param, "code": code}

    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        return {"error": self._fields}


def busy(message: str) -> ApiError:
    """Asks to come again."""
    kind, code = "rate_limit_error", "rate_limit_exceeded"
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(429, message, kind=kind, code=code, headers=headers)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is; the model always sees all that it can of it."""

    url: str
    detail: Literal["auto", "high"] = "auto"


class ImagePart(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """A message, its content always in parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part]

    @field_validator("content", mode="before")
    @classmethod
    def _in_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class JsonSchema(_Strict):
    """A schema and its name; answers always follow it to the letter."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _is_short(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if (length := len(str(schema))) > MAX_SCHEMA_LENGTH:
            raise ValueError(f"it has {length:,} characters of {MAX_SCHEMA_LENGTH:,}")
        return schema


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]

    def schema_of_answers(self) -> dict[str, Any] | None:
        """What an answer must follow, if anything."""
        return None


class JsonFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]

    def schema_of_answers(self) -> dict[str, Any] | None:
        """See `TextFormat`."""
        return ANY_OBJECT


class SchemaFormat(_Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def schema_of_answers(self) -> dict[str, Any] | None:
        """See `TextFormat`."""
        return self.json_schema.schema_


class StreamOptions(_Strict):
    """What a stream tells."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(_Strict):
    """What both kinds of requests have; `top_k` and what follows are not OpenAI's."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stop: list[Annotated[str, Field(max_length=MAX_STOP_LENGTH)]] = Field([], max_length=MAX_STOPS)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(
        None, gt=0, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, defaults: Options) -> Options:
        """How to answer, where the server's defaults are for what is not said."""
        given: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temp": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        options = replace(defaults, **{k: v for k, v in given.items() if v is not None})
        if self.top_p == 0:  # the likeliest token alone; for `Options` it would be all tokens
            options = replace(options, temp=0)
        return replace(options, stop=(*defaults.stop, *self.stop))

    def seeded(self, options: Options) -> list[Options]:
        """The options of each of the `n` answers, which a seed must not make equal."""
        if options.seed is None:
            return [options] * self.n
        return [replace(options, seed=(options.seed + i) % 2**64) for i in range(self.n)]


class ChatRequest(_Request):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: (
        Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None

    def options(self, defaults: Options) -> Options:
        """See `_Request`."""
        options = super().options(defaults)
        if self.max_completion_tokens is not None:
            options = replace(options, max_tokens=self.max_completion_tokens)
        if self.response_format is not None:
            options = replace(options, json_schema=self.response_format.schema_of_answers())
        return options

    @property
    def told_logprobs(self) -> int | None:
        """How many likeliest tokens to tell in place of each, or None for no tokens."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def pictures(self) -> list[str]:
        """The URLs of all pictures in order."""
        return [
            part.image_url.url
            for message in self.messages
            for part in message.content
            if isinstance(part, ImagePart)
        ]

    def texts(self) -> list[str]:
        """All texts in order."""
        return [
            part.text
            for message in self.messages
            for part in message.content
            if isinstance(part, TextPart)
        ]

    def conversation(self, pictures: Sequence[Any]) -> list[dict[str, Any]]:
        """The messages for `Processor`, with the pictures in their places."""
        following = iter(pictures)
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    if isinstance(part, TextPart)
                    else {"type": "image", "image": next(following)}
                    for part in message.content
                ],
            }
            for message in self.messages
        ]


class CompletionRequest(_Request):
    """The body of ``POST /v1/completions``: text as the model reads it, without pictures."""

    prompt: list[str] = Field(min_length=1, max_length=MAX_PROMPTS)
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_prompts(cls, prompt: Any) -> Any:
        return [prompt] if isinstance(prompt, str) else prompt

    def options(self, defaults: Options) -> Options:
        """See `_Request`."""
        return super().options(replace(defaults, max_tokens=DEFAULT_COMPLETION_TOKENS))

    @property
    def told_logprobs(self) -> int | None:
        """See `ChatRequest`."""
        return self.logprobs


Wanted: TypeAlias = ChatRequest | CompletionRequest


def read_request(body: bytes, kind: type[Wanted]) -> Wanted:
    """Reads a request.

    Raises:
        ApiError: It is no JSON, lacks something, or asks for what there is not.
    """
    try:
        data = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.")
    data = {key: value for key, value in data.items() if value is not None and key not in IGNORED}
    _drop_neutral(data)
    messages = data.get("messages")
    if isinstance(messages, list):
        data["messages"] = [_without_nothing(message) for message in messages]
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from error
    _check_pairs(request)
    return request


def _without_nothing(message: Any) -> Any:
    """A message without the fields that are null or, beside its text, empty."""
    if not isinstance(message, dict):
        return message
    return {
        key: value
        for key, value in message.items()
        if key == "content" or not (value is None or (key in NO_TEXT and not value))
    }


def _drop_neutral(data: dict[str, Any]) -> None:
    for name in data.keys() & NEUTRAL.keys():
        value = data.pop(name)
        if value not in NEUTRAL[name]:
            known = " or ".join(map(repr, NEUTRAL[name])) or "null"
            raise ApiError(
                400,
                f"{name} is not supported here; leave it out (or {known}).",
                param=name,
                code="unsupported_parameter",
            )


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}"
        return ApiError(400, message, param=param, code="unknown_parameter")
    if first["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, param=param, code="missing_required_parameter")
    found = repr(first["input"])
    found = found if len(found) <= 60 else found[:57] + "..."
    return ApiError(400, f"{param}: {first['msg']}; found {found}", param=param)


def _path(places: tuple[int | str, ...]) -> str:
    """Where something is, without the kinds of parts and formats that pydantic puts between."""
    kinds = {"text", "image_url"}
    return ".".join(
        str(place)
        for before, place in zip((None, *places), places, strict=False)
        if not (before == "response_format" or (isinstance(before, int) and place in kinds))
    )


def _check_pairs(request: Wanted) -> None:
    """Refuses parameters that need another one."""
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream=true.", param="stream_options")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
