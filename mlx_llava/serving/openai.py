"""OpenAI's API: what its clients send -> a `Request`, and a `Reply` -> what they read.

A parameter (platform.openai.com/docs/api-reference) is honoured, or refused by its name
(parameters.py). Taken is what real clients were seen to send, beside what OpenAI documents:
fields of their own, plain texts for parts and for images, answers without content.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    FailFast,
    Field,
    PrivateAttr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mlx_llava.generation.json_schema import ANY_OBJECT
from mlx_llava.generation.sampling import MAX_BIAS, Options
from mlx_llava.serving.chat_messages import ChatMessage
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import (
    MAX_MESSAGES,
    Form,
    RequestForm,
    Schema,
    Stops,
    as_list,
    parameter,
)
from mlx_llava.serving.parameters import check_parameters
from mlx_llava.serving.replies import Piece, Reply, Token, event
from mlx_llava.serving.requests import Request, arrange, as_seed, begun
from mlx_llava.serving.tools import ForcedTools, Growing, forced_tools

MAX_PROMPTS = 64
MAX_BIASES = 1000
MAX_FRAMES = 64
DEFAULT_COMPLETION_TOKENS = 16


def _unless_limited(tokens: int) -> int:
    """Takes -1 for no limit but the model's context, as llama.cpp and LM Studio do."""
    if tokens == -1:
        return sys.maxsize
    if tokens < 1:
        message = "Input should be greater than or equal to 1, or -1 for no limit"
        raise PydanticCustomError("max_tokens", message)
    return tokens


def _unless_none(bias: Any) -> Any:
    return bias or None


Biases: TypeAlias = Annotated[
    dict[
        Annotated[str, Field(pattern="^[0-9]{1,9}$")],
        Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)],
    ],
    Field(max_length=MAX_BIASES),
]
MaxTokens: TypeAlias = Annotated[int, AfterValidator(_unless_limited)]


class _TextFormat(Form):
    type: Literal["text"]


class _JsonFormat(Form):
    """Any JSON object, or one of a schema, as llama.cpp's clients ask for it."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema")


class _JsonSchema(Form):
    schema_: Schema = Field(alias="schema")


class _SchemaFormat(Form):
    type: Literal["json_schema"]
    json_schema: _JsonSchema


Format: TypeAlias = Annotated[
    _TextFormat | _JsonFormat | _SchemaFormat, Field(discriminator="type")
]


class _StreamOptions(Form):
    include_usage: bool | None = None


class AnswerRequest(RequestForm):
    """What both kinds of requests have; `top_k` and what follows are not OpenAI's."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    model: str
    max_tokens: MaxTokens | None = None
    temp: float | None = parameter("temp", le=2, validation_alias="temperature")
    top_p: float | None = parameter("top_p")
    n: int = Field(1, ge=1, le=128)
    stop: Stops = Field([])
    seed: Annotated[int, AfterValidator(as_seed)] | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    # -1 is for all, as in vLLM
    top_k: Annotated[int, Field(ge=-1), AfterValidator(partial(max, 0))] | None = None
    min_p: float | None = parameter("min_p")
    frequency_penalty: float | None = parameter("frequency_penalty")
    presence_penalty: float | None = parameter("presence_penalty")
    # [] is for none, as in llama.cpp
    logit_bias: Annotated[Biases | None, BeforeValidator(_unless_none)] = None
    repetition_penalty: float | None = Field(
        None, gt=0, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: dict[str, Any]) -> dict[str, Any]:
        check_parameters(data)
        return data

    async def whole(self, reply: Reply) -> dict[str, Any]:
        choices = [self.whole_choice(answer) for answer in await reply.whole()]
        return {**self._head(self.whole_object), "choices": choices, **_figures(reply)}

    async def events(self, reply: Reply) -> AsyncGenerator[str, None]:
        usage = {"usage": None} if self.stream_options.include_usage else {}
        head = {**self._head(self.chunk_object), **usage}
        try:
            async with aclosing(reply.pieces()) as pieces:
                async for piece in pieces:
                    for choice in self.choices(piece):
                        yield event({**head, "choices": [choice]})
        except ApiError as error:
            yield event(error.body())
            return
        if usage:
            yield event({**head, "choices": [], **_figures(reply)})
        yield "data: [DONE]\n\n"

    def whole_choice(self, answer: Piece) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def choices(self, piece: Piece) -> list[dict[str, Any]]:
        """What a stream tells of a piece."""
        return [self.whole_choice(piece)]

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": None,
            "object": kind,
        }


class ChatRequest(AnswerRequest):
    """Of ``POST /v1/chat/completions``."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        min_length=1, max_length=MAX_MESSAGES
    )
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Format | None = None
    tools: Any = None
    tool_choice: Any = None
    # not OpenAI's
    image_tokens: int | None = Field(None, ge=1)
    frames: int | None = Field(None, ge=1, le=MAX_FRAMES)

    _growing: dict[int, Growing] = PrivateAttr(default_factory=dict)

    def request(self, defaults: Options) -> Request:
        """Of two lengths, the newer parameter's is taken."""
        options = self.options(defaults, self.stop)
        if self.max_completion_tokens is not None:
            options = replace(options, max_tokens=self.max_completion_tokens)
        match self.response_format:
            case _SchemaFormat(json_schema=_JsonSchema(schema_=schema)):
                options = replace(options, json_schema=schema)
            case _JsonFormat(schema_=schema):
                options = replace(options, json_schema=schema or ANY_OBJECT)
            case _TextFormat():
                options = replace(options, json_schema=None)
        if tools := self._tools():
            options = replace(options, json_schema=tools.schema())
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
        turns, prefill = begun([message.turn() for message in self.messages])
        return Request(
            self.model,
            [arrange(turns)],
            options,
            prefill=prefill,
            images=[url for message in self.messages for url in message.images()],
            image_tokens=self.image_tokens,
            frames=self.frames,
            n=self.n,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            stream=self.stream,
        )

    def choices(self, piece: Piece) -> list[dict[str, Any]]:
        """An answer's first piece comes after its role."""
        growing = self._growing.setdefault(piece.index, Growing(self._tools()))
        is_new = growing.name is None
        new = growing.add(piece)
        delta: dict[str, Any] = {"content": new} if new else {}
        if growing.name is not None:
            call = _call(growing.name, new) if is_new else {"function": {"arguments": new}}
            delta = {"tool_calls": [{"index": 0, **call}]} if new or is_new else {}
        choice = self._choice(piece, growing, delta=delta)
        if piece.start:
            return [choice]
        role = {"role": "assistant", "content": "", "refusal": None}
        return [{**choice, "delta": role, "logprobs": None, "finish_reason": None}, choice]

    def whole_choice(self, answer: Piece) -> dict[str, Any]:
        growing = Growing(self._tools())
        growing.add(answer)
        message: dict[str, Any] = {"role": "assistant", "refusal": None, "annotations": []}
        if growing.name is None:
            message["content"] = growing.text
        else:
            call = _call(growing.name, growing.text)
            message.update(content=None, tool_calls=[call])
        return self._choice(answer, growing, message=message)

    def _tools(self) -> ForcedTools | None:
        return forced_tools(self.tools, self.tool_choice)

    def _choice(self, piece: Piece, growing: Growing, **said: Any) -> dict[str, Any]:
        told = {"content": logprobs(piece.tokens), "refusal": None} if self.logprobs else None
        reason = piece.finish_reason
        if reason == "stop" and growing.name is not None:
            reason = "tool_calls"
        figures = {"logprobs": told, "finish_reason": reason}
        return {"index": piece.index, **said, **figures}


class CompletionRequest(AnswerRequest):
    """Of ``POST /v1/completions``: text as the model reads it, without images."""

    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    prompt: Annotated[list[str], BeforeValidator(as_list)] = Field(
        min_length=1, max_length=MAX_PROMPTS
    )
    logprobs: int | None = Field(None, ge=0, le=5)

    def request(self, defaults: Options) -> Request:
        """What is asked; the length that is not said is OpenAI's."""
        return Request(
            self.model,
            self.prompt,
            self.options(replace(defaults, max_tokens=DEFAULT_COMPLETION_TOKENS), self.stop),
            n=self.n,
            top_logprobs=self.logprobs,
            stream=self.stream,
        )

    def whole_choice(self, answer: Piece) -> dict[str, Any]:
        return {
            "text": answer.text,
            "index": answer.index,
            "logprobs": None if self.logprobs is None else _with_offsets(answer),
            "finish_reason": answer.finish_reason,
        }


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _with_offsets(piece: Piece) -> dict[str, Any]:
    """The tokens of a piece and where each begins in the answer."""
    at, tokens, offsets = piece.start, piece.tokens, []
    if at == 0 and tokens and tokens[0].text[:1] == " " != piece.text[:1]:
        at = -1  # tokenizers drop the space that an answer begins with
    for token in tokens:
        offsets.append(max(at, 0))
        at += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{t.text: t.logprob for t in token.top} for token in tokens],
        "text_offset": offsets,
    }


def logprobs(tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """What is told of tokens."""
    return [{**_logprob(t), "top_logprobs": [*map(_logprob, t.top)]} for t in tokens]


def _logprob(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": [*token.content]}


def _figures(reply: Reply) -> dict[str, Any]:
    """Usage, and ``timings``, which are not OpenAI's."""
    usage = {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.generation_tokens,
        "total_tokens": reply.prompt_tokens + reply.generation_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }
    return {"usage": usage, "timings": reply.timings}
