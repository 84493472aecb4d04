"""OpenAI's Responses API: what its clients send -> a `Request`, and a `Reply` -> what they read."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, PrivateAttr, model_validator

from mlx_llava.generation.json_schema import ANY_OBJECT
from mlx_llava.generation.sampling import Options
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import (
    MAX_MESSAGES,
    Form,
    RequestForm,
    Stops,
    parameter,
)
from mlx_llava.serving.kept import Answered, Kept
from mlx_llava.serving.parameters import Neutral, refuse_said
from mlx_llava.serving.replies import Piece, Reply
from mlx_llava.serving.requests import Request, Turn, arrange, as_seed, begun
from mlx_llava.serving.response_events import Response
from mlx_llava.serving.response_items import Item, as_items, resolved
from mlx_llava.serving.schemas import MAX_SCHEMA_LENGTH, Schema, wanted
from mlx_llava.serving.tools import ForcedTools, described, forced_tools

#: What would change the answer, and the values that do not.
UNSUPPORTED: Neutral = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "prompt": (),
}
_LOGPROBS = "message.output_text.logprobs"


class _Format(Form):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=256)
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class _TextOptions(Form):
    format: _Format = _Format.model_validate({"type": "text"})


class ResponseRequest(RequestForm):
    """Of ``POST /v1/responses``."""

    model: str
    input: Annotated[list[Item], FailFast(), BeforeValidator(as_items)] = Field(
        [], max_length=MAX_MESSAGES
    )
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    truncation: Literal["auto", "disabled"] = "disabled"
    max_tokens: int | None = Field(None, ge=1, validation_alias="max_output_tokens")
    temp: float | None = parameter("temp", le=2, validation_alias="temperature")
    top_p: float | None = parameter("top_p")
    stop: Stops = Field([])  # not OpenAI's
    seed: Annotated[int, AfterValidator(as_seed)] | None = None  # the same
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] = Field([])
    text: _TextOptions = _TextOptions()
    tools: Any = None
    tool_choice: Any = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = (
        Field({}, max_length=16)
    )
    stream: bool = False

    _kept: Kept | None = PrivateAttr(None)
    _asked: Request = PrivateAttr()
    _turns: list[Turn] = PrivateAttr()
    _repeated: dict[str, Any] = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: dict[str, Any]) -> dict[str, Any]:
        refuse_said(data, UNSUPPORTED)
        return data

    def recall(self, kept: Kept) -> None:
        """Says where earlier answers are, and where this one is to be kept."""
        self._kept = kept

    def request(self, defaults: Options) -> Request:
        earlier, items = self._earlier(), resolved(self.input, self._kept)
        turns, prefill = begun([*earlier.turns, *(item.turn() for item in items)])
        instructions: list[Turn] = [("system", [self.instructions or ""], 0)]
        shown = described(turns, self._tools())
        self._turns = turns
        said = {"tool_choice": self.tool_choice or "auto", "tools": self.tools or []}
        if len(str(said)) > MAX_SCHEMA_LENGTH:  # which no stream should repeat
            said = {"tool_choice": "auto", "tools": []}
        self._repeated = said
        self._asked = Request(
            self.model,
            [arrange([*(instructions if self.instructions else ()), *shown])],
            self._with_format(self.options(defaults, self.stop)),
            images=[*earlier.images, *(url for item in items for url in item.images())],
            prefill=prefill,
            top_logprobs=(self.top_logprobs or 0) if self._has_logprobs() else None,
            stream=self.stream,
            truncate=self.truncation == "auto",
        )
        return self._asked

    def _earlier(self) -> Answered:
        name = self.previous_response_id
        if name is None or self._kept is None:
            return Answered((), (), {})
        try:
            return self._kept.get(name)
        except ApiError as error:
            code, param = "previous_response_not_found", "previous_response_id"
            raise ApiError(400, str(error), code, param=param) from error

    def _with_format(self, options: Options) -> Options:
        form = self.text.format
        if tools := self._tools():
            return replace(options, json_schema=tools.schema())
        if form.type == "json_schema" and form.schema_ is None:
            message = "Missing required parameter: 'text.format.schema'."
            raise ApiError(400, message, "missing_required_parameter", param="text.format.schema")
        if form.type != "text":
            return replace(options, json_schema=wanted(form.schema_ or ANY_OBJECT, form.strict))
        return replace(options, json_schema=None) if "text" in self.model_fields_set else options

    def _has_logprobs(self) -> bool:
        return self.top_logprobs is not None or _LOGPROBS in self.include

    def _tools(self) -> ForcedTools | None:
        return forced_tools(self.tools, self.tool_choice)

    async def whole(self, reply: Reply) -> dict[str, Any]:
        response = self._response()
        (answer,) = await reply.whole()
        response.add(answer)
        return self._ended(response, answer)

    async def events(self, reply: Reply) -> AsyncGenerator[str, None]:
        response = self._response()
        for line in response.begin():
            yield line
        try:
            async with aclosing(reply.pieces()) as pieces:
                async for piece in pieces:
                    for line in response.go_on(piece):
                        yield line
        except ApiError as error:
            yield response.fail(error)
            return
        for line in response.end(piece):
            yield line
        yield response.last(self._ended(response, piece))

    def _response(self) -> Response:
        options = self._asked.options
        said = {
            "model": self.model,
            "instructions": self.instructions,
            "max_output_tokens": self.max_tokens,
            "metadata": self.metadata,
            "previous_response_id": self.previous_response_id,
            "store": self.store,
            "temperature": options.temp,
            "text": {"format": self.text.format.model_dump(by_alias=True, exclude_none=True)},
            **self._repeated,
            "top_logprobs": self.top_logprobs,
            "top_p": options.top_p or 1,
            "truncation": self.truncation,
        }
        return Response(said, self._tools(), self._has_logprobs())

    def _ended(self, response: Response, last: Piece) -> dict[str, Any]:
        """What is told at the end, and kept if it is to be."""
        body = response.body(last)
        said: Turn = ("assistant", [self._asked.prefill + response.text], 0)
        answered = Answered([*self._turns, said], self._asked.images, body)
        body["store"] = self.store and self._kept is not None and self._kept.fits(answered)
        if body["store"] and self._kept is not None:
            self._kept.add(body["id"], answered)
        return body
