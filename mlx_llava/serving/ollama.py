"""Ollama's API: what its clients send -> a `Request`, and a `Reply` -> what they read.

As its docs/api.md and server/routes.go have it (github.com/ollama/ollama). An option is honoured,
or refused by its name; those that say how to compute, and not what, are taken without effect.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, FailFast, Field, model_validator

from mlx_llava.generation.json_schema import ANY_OBJECT
from mlx_llava.generation.sampling import Options
from mlx_llava.serving.durations import as_seconds
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import (
    MAX_MESSAGES,
    RequestForm,
    Stops,
    parameter,
)
from mlx_llava.serving.ollama_messages import ChatMessage, Images
from mlx_llava.serving.parameters import Neutral, refuse_said
from mlx_llava.serving.replies import Piece, Reply, Token, as_json
from mlx_llava.serving.requests import Request, Turn, arrange, as_seed, begun
from mlx_llava.serving.schemas import closed, short_schema, wanted

LINES = "application/x-ndjson"
_UNSUPPORTED: Neutral = {"suffix": ("",), "think": (False,)}
_UNSUPPORTED_OPTIONS: Neutral = {
    "mirostat": (0,),
    "repeat_last_n": (20,),
    "tfs_z": (1,),
    "typical_p": (1,),
}
_FORMATS = {"": None, "json": ANY_OBJECT}
_OPTIONS = (
    "frequency_penalty min_p num_predict presence_penalty repeat_penalty seed stop temperature "
    "top_k top_p"
).split()


def _as_seed(number: int) -> int | None:
    """Takes -1 for any."""
    return None if number == -1 else as_seed(number)


def _as_duration(duration: Any) -> Any:
    """Takes 5m, and -1 for ever."""
    return as_seconds(duration) if isinstance(duration, str | int | float) else duration


def _as_schema(format: Any) -> Any:
    """Takes Ollama's words for no schema, and for one of any object."""
    if isinstance(format, str):
        return _FORMATS.get(format, format)
    return wanted(closed(short_schema(format))) if isinstance(format, dict) else format


Duration = Annotated[Annotated[float, AllowInfNan()], BeforeValidator(_as_duration)]


class _AnswerRequest(RequestForm):
    """What both kinds of requests have; options are fields like the others."""

    media_type: ClassVar[str] = LINES

    model: str
    truncate: bool = True
    stream: bool = True
    format: Annotated[dict[str, Any] | None, BeforeValidator(_as_schema)] = None
    keep_alive: Duration | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    # options; less than one token is no limit, and less than one likeliest token all of them
    max_tokens: int | None = Field(None, validation_alias="num_predict")
    temp: float | None = parameter("temp", validation_alias="temperature")
    top_p: float | None = parameter("top_p")
    top_k: Annotated[int, AfterValidator(partial(max, 0))] | None = None
    min_p: float | None = parameter("min_p")
    repetition_penalty: float | None = Field(None, gt=0, validation_alias="repeat_penalty")
    frequency_penalty: float | None = parameter("frequency_penalty")
    presence_penalty: float | None = parameter("presence_penalty")
    seed: Annotated[int, AfterValidator(_as_seed)] | None = None
    stop: Stops = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _with_options(cls, data: dict[str, Any]) -> dict[str, Any]:
        refuse_said(data, _UNSUPPORTED)
        options = data.get("options", {})
        if not isinstance(options, dict):
            raise ApiError(400, "options: Input should be an object", param="options")
        if options.get("repeat_penalty") in (None, 1):
            options = {**options, "repeat_last_n": None}
        refuse_said(options, _UNSUPPORTED_OPTIONS)
        return {
            **data,
            **{name: options[name] for name in _OPTIONS if options.get(name) is not None},
        }

    def request(self, defaults: Options) -> Request:
        options = self.options(defaults, self.stop)
        if self.max_tokens is not None and self.max_tokens < 1:
            options = replace(options, max_tokens=sys.maxsize)
        if self.format is not None:
            options = replace(options, json_schema=self.format)
        prompts, images, prefill = self.asked()
        return Request(
            self.model,
            prompts,
            options,
            images=images,
            prefill=prefill,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            stream=self.stream,
            keep_alive=self.keep_alive,
            truncate=self.truncate,
        )

    def asked(self) -> tuple[list[Any], list[str], str]:
        """The prompts (none, where the model is only to be loaded), images, and how to begin."""
        raise NotImplementedError

    def said(self, text: str) -> dict[str, Any]:
        """How text is told."""
        raise NotImplementedError

    async def whole(self, reply: Reply) -> dict[str, Any]:
        answers = await reply.whole()
        piece = answers[0] if answers else None
        return {**self._part(piece), **self._end(piece, reply)}

    async def events(self, reply: Reply) -> AsyncGenerator[str, None]:
        """The last line has the figures, and no text."""
        piece = None
        try:
            async with aclosing(reply.pieces()) as pieces:
                async for piece in pieces:
                    if piece.text or piece.tokens:
                        yield line(self._part(piece))
        except ApiError as error:
            yield line(error.body("/api/"))
            return
        yield line({**self._part(None), **self._end(piece, reply)})

    def _part(self, piece: Piece | None) -> dict[str, Any]:
        """A piece, or nothing, of an answer that goes on."""
        head = {"model": self.model, "created_at": moment()}
        said = {**head, **self.said("" if piece is None else piece.text), "done": False}
        if piece is None or not self.logprobs:
            return said
        tokens = [{**_logprob(t), "top_logprobs": [*map(_logprob, t.top)]} for t in piece.tokens]
        return {**said, "logprobs": tokens}

    def _end(self, piece: Piece | None, reply: Reply) -> dict[str, Any]:
        """What is told at the end; durations are nanoseconds."""
        if piece is None:
            return {"done": True, "done_reason": "unload" if self.keep_alive == 0 else "load"}
        seconds = reply.timings
        return {
            "done": True,
            "done_reason": piece.finish_reason,
            "total_duration": time.monotonic_ns() - reply.began,
            "load_duration": 0,
            "prompt_eval_count": reply.prompt_tokens,
            "prompt_eval_duration": round((seconds["encode"] + seconds["prefill"]) * 1e9),
            "eval_count": reply.generation_tokens,
            "eval_duration": round(seconds["decode"] * 1e9),
        }


class ChatRequest(_AnswerRequest):
    """Of ``POST /api/chat``."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field([], max_length=MAX_MESSAGES)

    def asked(self) -> tuple[list[Any], list[str], str]:
        images = [url for message in self.messages for url in message.images]
        turns, prefill = begun([message.turn() for message in self.messages])
        return [arrange(turns)] if turns else [], images, prefill

    def said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}


class GenerateRequest(_AnswerRequest):
    """Of ``POST /api/generate``: one turn, or with `raw` the text as the model reads it."""

    prompt: str = ""
    images: Images = Field(default_factory=list)
    system: str = ""
    raw: bool = False
    template: str = ""
    context: Sequence[int] = ()

    def headers(self) -> Mapping[str, str]:
        """Warns of what has no effect."""
        ignored = [name for name in ("context", "template") if getattr(self, name)]
        text = f"ignored: {', '.join(ignored)}; ask /api/chat with earlier turns"
        return {"Warning": f'299 mlx_llava "{text}"'} if ignored else {}

    def asked(self) -> tuple[list[Any], list[str], str]:
        if not self.prompt and not self.images:
            return [], [], ""
        if self.raw:
            return [self.prompt], self.images, ""
        system: list[Turn] = [("system", [self.system], 0)] if self.system else []
        return [arrange([*system, ("user", [self.prompt], len(self.images))])], self.images, ""

    def said(self, text: str) -> dict[str, Any]:
        return {"response": text}


def _logprob(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": [*token.content]}


def line(data: Mapping[str, Any]) -> str:
    """A line of a stream."""
    return as_json(data) + "\n"


def moment(seconds: float = 0) -> str:
    """When so many seconds will have gone by, as Ollama tells it."""
    then = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return then.isoformat().replace("+00:00", "Z")
