"""Anthropic's Messages API: what its clients send -> a `Request`, and a `Reply` -> what they read.

A parameter (platform.claude.com/docs/en/api/messages) is honoured, or refused by its name. Tools
are called where one has to be: its input is then JSON of a schema.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, FailFast, Field, model_validator
from pydantic_core import from_json

from mlx_llava.generation.sampling import Options
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import (
    MAX_MESSAGES,
    MAX_PARTS,
    Form,
    RequestForm,
    Stops,
    as_parts,
    parameter,
)
from mlx_llava.serving.parameters import Neutral, refuse_said
from mlx_llava.serving.replies import Piece, Reply, as_json, event
from mlx_llava.serving.requests import Request, Turn, arrange, begun
from mlx_llava.serving.schemas import Schema, wanted
from mlx_llava.serving.tools import ForcedTools, Growing, described, forced_tools

#: What would change the answer, and the values that do not.
UNSUPPORTED: Neutral = {"container": (), "context_management": ({},), "mcp_servers": ([],)}
#: Thoughts of other models, which templates leave out of earlier answers.
_THOUGHTS = ("thinking", "redacted_thinking")


class _Text(Form):
    type: Literal["text"]
    text: str


class _Base64(Form):
    type: Literal["base64"]
    data: str

    def address(self) -> str:
        return f"data:;base64,{self.data}"


class _Url(Form):
    type: Literal["url"]
    url: str

    def address(self) -> str:
        return self.url


class _Image(Form):
    type: Literal["image"]
    source: Annotated[_Base64 | _Url, Field(discriminator="type")]


Seen: TypeAlias = Annotated[_Text | _Image, Field(discriminator="type")]


class _ToolUse(Form):
    type: Literal["tool_use"]
    input: dict[str, Any] = Field({})


class _ToolResult(Form):
    type: Literal["tool_result"]
    content: Annotated[
        list[Seen], FailFast(), BeforeValidator(as_parts), Field(max_length=MAX_PARTS)
    ] = Field([])


Block: TypeAlias = Annotated[_Text | _Image | _ToolUse | _ToolResult, Field(discriminator="type")]


def _blocks(content: Any) -> Any:
    blocks = as_parts(content)
    if not isinstance(blocks, list):
        return blocks
    return [b for b in blocks if not (isinstance(b, dict) and b.get("type") in _THOUGHTS)]


class _Message(Form):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[Block], FailFast(), BeforeValidator(_blocks), Field(max_length=MAX_PARTS)
    ]

    def seen(self) -> list[_Text | _Image]:
        """Its texts and images in order; a tool's as the user's, a call as its JSON."""
        seen: list[_Text | _Image] = []
        for block in self.content:
            if isinstance(block, _ToolResult):
                seen += block.content
            elif isinstance(block, _ToolUse):
                seen.append(_Text(type="text", text=as_json(block.input)))
            else:
                seen.append(block)
        return seen

    def turn(self) -> Turn:
        texts = [part.text for part in self.seen() if isinstance(part, _Text)]
        return self.role, texts, len(self.images())

    def images(self) -> list[str]:
        return [part.source.address() for part in self.seen() if isinstance(part, _Image)]


class _Format(Form):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class _Output(Form):
    format: _Format | None = None


class CountRequest(RequestForm):
    """Of ``POST /v1/messages/count_tokens``: a conversation."""

    model: str
    messages: Annotated[list[_Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Annotated[list[_Text], FailFast(), BeforeValidator(as_parts)] = Field(
        [], max_length=MAX_PARTS
    )
    stop_sequences: Stops = Field([])
    output_config: _Output = _Output()
    tools: Any = None
    tool_choice: Any = None

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: dict[str, Any]) -> dict[str, Any]:
        refuse_said(data, UNSUPPORTED)
        return data

    def request(self, defaults: Options) -> Request:
        system: list[Turn] = [("system", [part.text for part in self.system], 0)]
        turns, prefill = begun([message.turn() for message in self.messages])
        return Request(
            self.model,
            [arrange([*(system if self.system else ()), *described(turns, self._tools())])],
            defaults,
            images=[url for message in self.messages for url in message.images()],
            prefill=prefill,
        )

    def _tools(self) -> ForcedTools | None:
        return forced_tools(self.tools, self.tool_choice)


class MessagesRequest(CountRequest):
    """Of ``POST /v1/messages``."""

    max_tokens: int = Field(ge=1)
    temp: float | None = parameter("temp", le=1, validation_alias="temperature")
    top_p: float | None = parameter("top_p")
    top_k: int | None = parameter("top_k")
    stream: bool = False

    def request(self, defaults: Options) -> Request:
        options, tools = self.options(defaults, self.stop_sequences), self._tools()
        if self.output_config.format:
            options = replace(options, json_schema=wanted(self.output_config.format.schema_))
        if tools:
            options = replace(options, json_schema=tools.schema())
        return replace(super().request(options), stream=self.stream)

    async def whole(self, reply: Reply) -> dict[str, Any]:
        said = Growing(self._tools())
        (answer,) = await reply.whole()
        said.add(answer)
        block = _block(said.name, said.text)
        end = {**self._end(said, answer), "usage": _usage(answer.figures)}
        return {**self._head(), "content": [block], **end}

    async def events(self, reply: Reply) -> AsyncGenerator[str, None]:
        said, is_open = Growing(self._tools()), False
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        start = {**self._head(), **nothing, "usage": _usage(reply.beginning)}
        yield _event("message_start", message=start)
        try:
            async with aclosing(reply.pieces()) as pieces:
                async for piece in pieces:
                    new = said.add(piece)
                    if not is_open and (new or piece.finish_reason):
                        is_open = True
                        block = _block(said.name, "")
                        yield _event("content_block_start", index=0, content_block=block)
                    if new:
                        yield _event("content_block_delta", index=0, delta=_delta(said.name, new))
        except ApiError as error:
            yield event(error.body("/v1/messages"), "error")
            return
        yield _event("content_block_stop", index=0)
        end = self._end(said, piece)
        yield _event("message_delta", delta=end, usage=_usage(piece.figures))
        yield _event("message_stop")

    def _head(self) -> dict[str, Any]:
        head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
        return {**head, "model": self.model}

    def _end(self, said: Growing, last: Piece) -> dict[str, Any]:
        """Why the answer ends."""
        stop = last.stop if last.stop in self.stop_sequences else None
        reason = "end_turn" if stop is None else "stop_sequence"
        if last.finish_reason == "length":
            reason = "max_tokens"
        elif said.name is not None:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": stop}


def _block(tool: str | None, text: str) -> dict[str, Any]:
    if tool is None:
        return {"type": "text", "text": text}
    said = from_json(text or "{}", allow_partial=True)  # where the answer is cut off
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": tool, "input": said}


def _delta(tool: str | None, text: str) -> dict[str, Any]:
    if tool is None:
        return {"type": "text_delta", "text": text}
    return {"type": "input_json_delta", "partial_json": text}


def _usage(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What was read, of which the part that was known counts for itself, and written."""
    cached = figures["cached_tokens"]
    return {
        "input_tokens": figures["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": figures["generation_tokens"],
    }


def _event(kind: str, **fields: Any) -> str:
    return event({"type": kind, **fields}, kind)
