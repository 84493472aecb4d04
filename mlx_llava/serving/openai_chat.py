"""OpenAI's chats: what clients send -> a `Request`, and a `Reply` -> what they read."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import FailFast, Field, PrivateAttr

from mlx_llava.generation.json_schema import ANY_OBJECT
from mlx_llava.generation.sampling import Options
from mlx_llava.serving.chat_messages import ChatMessage
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import MAX_MESSAGES, Form
from mlx_llava.serving.openai import AnswerRequest, MaxTokens, logprobs
from mlx_llava.serving.replies import Piece
from mlx_llava.serving.requests import Request, arrange, begun
from mlx_llava.serving.schemas import Schema, wanted
from mlx_llava.serving.tools import ForcedTools, Growing, described, forced_tools

MAX_FRAMES = 64


class _TextFormat(Form):
    type: Literal["text"]


class _JsonFormat(Form):
    """Any JSON object, or one of a schema, as llama.cpp's clients ask for it."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema")


class _JsonSchema(Form):
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class _SchemaFormat(Form):
    type: Literal["json_schema"]
    json_schema: _JsonSchema


Format: TypeAlias = Annotated[
    _TextFormat | _JsonFormat | _SchemaFormat, Field(discriminator="type")
]


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
            case _SchemaFormat(json_schema=_JsonSchema(schema_=schema, strict=strict)):
                options = replace(options, json_schema=wanted(schema, strict))
            case _JsonFormat(schema_=schema):
                options = replace(options, json_schema=wanted(schema or ANY_OBJECT))
            case _TextFormat():
                options = replace(options, json_schema=None)
        if tools := self._tools():
            options = replace(options, json_schema=tools.schema())
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
        turns, prefill = begun([message.turn() for message in self.messages])
        return Request(
            self.model,
            [arrange(described(turns, tools))],
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


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
