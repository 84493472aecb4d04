"""OpenAI's completions of texts: what clients send -> a `Request`, and what they read."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mlx_llava.generation.sampling import Options
from mlx_llava.serving.forms import as_list
from mlx_llava.serving.openai import AnswerRequest
from mlx_llava.serving.replies import Piece
from mlx_llava.serving.requests import Request

MAX_PROMPTS = 64
DEFAULT_COMPLETION_TOKENS = 16


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
