"""The requests of OpenAI's clients, checked (platform.openai.com/docs/api-reference).

A parameter is honoured, or refused by its name (parameters.py). Ignored are those that ask
nothing of the answer.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    FailFast,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError

from mlx_llava.generation.json_schema import ANY_OBJECT
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.messages import Message
from mlx_llava.inputs.processor import Inputs, Processor
from mlx_llava.serving.bodies import read_json
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.messages import MAX_MESSAGES, ChatMessage, Lenient, conversation
from mlx_llava.serving.parameters import check_parameters

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_PROMPTS = 64
MAX_SCHEMA_LENGTH = 100_000
DEFAULT_COMPLETION_TOKENS = 16
#: Options that a request has under their own names, and as they are.
_OPTIONS = {option.name for option in fields(Options)} - {"stop", "json_schema"}
#: Tells what was found, of whatever length, by its beginning and its end.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 60


def _unless_limited(tokens: int) -> int:
    """Takes -1 for no limit but the model's context, as llama.cpp and LM Studio do."""
    if tokens == -1:
        return sys.maxsize
    if tokens < 1:
        message = "Input should be greater than or equal to 1, or -1 for no limit"
        raise PydanticCustomError("max_tokens", message)
    return tokens


def _as_seed(number: int) -> int:
    """Takes any whole number, where MLX takes those of 64 bits."""
    return number % 2**64


def _or_off(count: int) -> int:
    """Takes -1 for all, as vLLM does."""
    return max(count, 0)


def _short(schema: Any) -> Any:
    if (length := len(str(schema))) > MAX_SCHEMA_LENGTH:
        raise ValueError(f"it has {length:,} characters of {MAX_SCHEMA_LENGTH:,}")
    return schema


MaxTokens: TypeAlias = Annotated[int, AfterValidator(_unless_limited)]
Schema: TypeAlias = Annotated[dict[str, Any], BeforeValidator(_short)]


class TextFormat(Lenient):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Lenient):
    """Any JSON object, or one of a schema, as llama.cpp's clients ask for it."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema")


class JsonSchema(Lenient):
    """A schema; answers always follow it to the letter."""

    schema_: Schema = Field(alias="schema")


class SchemaFormat(Lenient):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


AnswerFormat: TypeAlias = Annotated[
    TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")
]


class StreamOptions(Lenient):
    """What a stream tells; a whole answer always tells it."""

    include_usage: bool | None = None


class AnswerRequest(Lenient):
    """What both kinds of requests have; `top_k` and what follows are not OpenAI's."""

    model: str
    max_tokens: MaxTokens | None = None
    temp: float | None = Field(None, ge=0, le=2, validation_alias="temperature")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stop: list[Annotated[str, Field(max_length=MAX_STOP_LENGTH)]] = Field([], max_length=MAX_STOPS)
    seed: Annotated[int, AfterValidator(_as_seed)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    top_k: Annotated[int, Field(ge=-1), AfterValidator(_or_off)] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(
        None, gt=0, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options.include_usage)

    @property
    def requested_logprobs(self) -> int | None:
        """How many likeliest tokens to tell in place of each, or None for no tokens."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """How many answers there are to be."""
        return self.n

    def longest(self) -> int:
        """The characters of its longest prompt."""
        raise NotImplementedError

    def pictures(self) -> list[str]:
        """The URLs of all pictures in order."""
        return []

    def inputs(self, processor: Processor, images: Sequence[Any]) -> list[Inputs]:
        """Its prompts as the model reads them, with images for the URLs of its pictures."""
        raise NotImplementedError

    def options(self, defaults: Options) -> Options:
        """How to answer, where the server's defaults are for what is not said."""
        options = replace(defaults, **self.model_dump(include=_OPTIONS, exclude_none=True))
        if self.top_p == 0:  # the likeliest token alone; for `Options` it would be all tokens
            options = replace(options, temp=0)
        return replace(options, stop=(*defaults.stop, *filter(None, self.stop)))

    def seeded(self, options: Options) -> list[Options]:
        """The options of each of the `n` answers, which a seed must not make equal."""
        if options.seed is None:
            return [options] * self.n
        return [replace(options, seed=_as_seed(options.seed + i)) for i in range(self.n)]


class ChatRequest(AnswerRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        min_length=1, max_length=MAX_MESSAGES
    )
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: AnswerFormat | None = None

    def options(self, defaults: Options) -> Options:
        """See `AnswerRequest`; of two lengths, the newer parameter's is taken."""
        options = super().options(defaults)
        if self.max_completion_tokens is not None:
            options = replace(options, max_tokens=self.max_completion_tokens)
        match self.response_format:
            case SchemaFormat(json_schema=JsonSchema(schema_=schema)):
                return replace(options, json_schema=schema)
            case JsonFormat(schema_=schema):
                return replace(options, json_schema=schema or ANY_OBJECT)
            case TextFormat():
                return replace(options, json_schema=None)
        return options

    @property
    def requested_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def longest(self) -> int:
        return sum(map(len, self.texts()))

    def pictures(self) -> list[str]:
        return [url for message in self.messages for url in message.pictures()]

    def texts(self) -> list[str]:
        return [text for message in self.messages for text in message.texts()]

    def conversation(self) -> list[Message]:
        return conversation(self.messages)

    def inputs(self, processor: Processor, images: Sequence[Any]) -> list[Inputs]:
        return [processor(self.conversation(), images)]


class CompletionRequest(AnswerRequest):
    """The body of ``POST /v1/completions``: text as the model reads it, without pictures."""

    prompt: list[str] = Field(min_length=1, max_length=MAX_PROMPTS)
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_prompts(cls, prompt: Any) -> Any:
        return [prompt] if isinstance(prompt, str) else prompt

    def options(self, defaults: Options) -> Options:
        return super().options(replace(defaults, max_tokens=DEFAULT_COMPLETION_TOKENS))

    @property
    def requested_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def answers(self) -> int:
        return self.n * len(self.prompt)

    def longest(self) -> int:
        return max(map(len, self.prompt))

    def inputs(self, processor: Processor, images: Sequence[Any]) -> list[Inputs]:  # noqa: ARG002
        return [processor(text, raw=True) for text in self.prompt]


AnyRequest = TypeVar("AnyRequest", bound=AnswerRequest)


def read_request(body: bytes, kind: type[AnyRequest]) -> AnyRequest:
    """Reads a request.

    Raises:
        ApiError: It is no JSON, lacks something, or asks for what there is not.
    """
    data = {key: value for key, value in read_json(body).items() if value is not None}
    check_parameters(data)
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from error
    if isinstance(request, ChatRequest):
        _check_chat(request)
    return request


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    param = _path(first["loc"])
    if first["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, param=param, code="missing_required_parameter")
    message = f"{param}: {first['msg']}; found {_BRIEF.repr(first['input'])}"
    return ApiError(400, message, param=param)


def _path(places: tuple[int | str, ...]) -> str:
    """Where something is, without the kinds of parts and formats that pydantic puts between."""
    kinds = {"text", "image_url"}
    return ".".join(
        str(place)
        for before, place in zip((None, *places), places, strict=False)
        if not (before == "response_format" or (isinstance(before, int) and place in kinds))
    )


def _check_chat(request: ChatRequest) -> None:
    """Refuses what no template writes, and parameters that need another one."""
    while request.messages and request.messages[-1].is_answer_to_come:
        request.messages.pop()
    roles = [turn.role for turn in request.messages if turn.role in ("user", "assistant")]
    if roles[-1:] != ["user"]:
        found = roles[-1] if roles else "none"
        raise ApiError(400, f"The last turn must be the user's; found {found}.", param="messages")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
