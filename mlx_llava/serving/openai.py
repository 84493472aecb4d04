"""OpenAI's API: what requests for chats and for completions of texts have in common.

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
from functools import partial
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mlx_llava.generation.sampling import MAX_BIAS
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import (
    Form,
    RequestForm,
    Stops,
    parameter,
)
from mlx_llava.serving.parameters import check_parameters
from mlx_llava.serving.replies import Piece, Reply, Token, event
from mlx_llava.serving.requests import as_seed

MAX_BIASES = 1000


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
