"""What OpenAI's clients read: whole answers, pieces of streams, usage, log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_llava.serving.engine import Likelihood, Piece, Token


@dataclass
class Usage:
    """How many tokens a request took."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def add(self, figures: Mapping[str, Any], is_new_prompt: bool) -> None:
        """Counts an answer, and its prompt unless another answer has the same one."""
        self.completion += figures["generation_tokens"]
        if is_new_prompt:
            self.prompt += figures["prompt_tokens"]
            self.cached += figures["cached_tokens"]

    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }


class Tally:
    """The usage of a request, and the timings of its first answer."""

    def __init__(self, n: int) -> None:
        """Begins to count, where each prompt has `n` answers."""
        self._n = n
        self.usage = Usage()
        self.timings: dict[str, float] = {}

    def add(self, piece: Piece) -> None:
        """Counts an answer that ends."""
        if piece.finish_reason:
            self.usage.add(piece.figures, is_new_prompt=piece.index % self._n == 0)
            if piece.index == 0:
                self.timings = piece.figures["timings"]


class Shape:
    """The objects in which one request is answered; ``timings`` in them are not OpenAI's."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, has_logprobs: bool, include_usage: bool) -> None:
        """Begins an answer.

        Args:
            model (str): The model's name.
            has_logprobs (bool): Whether tokens are told.
            include_usage (bool): Whether a stream ends with the usage, which is null till then.
        """
        self.include_usage = include_usage
        self._has_logprobs = has_logprobs
        self._told: dict[int, int] = {}  # characters of each answer
        self._head = {
            "id": self.prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def whole(
        self, answers: Sequence[Piece], usage: Usage, timings: Mapping[str, float]
    ) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._whole_choice(answer) for answer in answers]
        ending = {"choices": choices, "usage": usage.body(), "timings": timings}
        return {**self._head, "object": self.whole_object, **ending}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """What a stream tells of a piece."""
        choices = []
        if piece.index not in self._told:
            self._told[piece.index] = 0
            choices += self._opening(piece.index)
        if piece.text or piece.tokens or piece.finish_reason:
            choices.append(self._choice(piece))
        self._told[piece.index] += len(piece.text)
        return [self._chunk([choice]) for choice in choices]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def last_chunk(self, usage: Usage, timings: Mapping[str, float]) -> dict[str, Any]:
        """The last chunk of a stream, with the usage."""
        return {**self._chunk([]), "usage": usage.body(), "timings": timings}

    def _opening(self, index: int) -> list[dict[str, Any]]:
        """What an answer opens with in a stream."""
        raise NotImplementedError

    def _choice(self, piece: Piece) -> dict[str, Any]:
        """A piece of an answer in a stream."""
        raise NotImplementedError

    def _whole_choice(self, answer: Piece) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError


class ChatShape(Shape):
    """Of ``/v1/chat/completions``."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def _whole_choice(self, answer: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        return {
            "index": answer.index,
            "message": {**message, "refusal": None, "annotations": []},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = [
            {**_likelihood(token.chosen), "top_logprobs": [*map(_likelihood, token.top)]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _likelihood(likelihood: Likelihood) -> dict[str, Any]:
    return {
        "token": likelihood.text,
        "logprob": likelihood.logprob,
        "bytes": [*likelihood.content],
    }


class CompletionShape(Shape):
    """Of ``/v1/completions``."""

    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def _opening(self, index: int) -> list[dict[str, Any]]:  # noqa: ARG002
        return []

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "text": piece.text,
            "index": piece.index,
            "logprobs": self._logprobs(piece, self._told.get(piece.index, 0)),
            "finish_reason": piece.finish_reason,
        }

    def _whole_choice(self, answer: Piece) -> dict[str, Any]:
        return self._choice(answer)

    def _logprobs(self, piece: Piece, at: int) -> dict[str, Any] | None:
        """Tokens and where each begins in the text, `at` being where the piece does."""
        if not self._has_logprobs:
            return None
        tokens = piece.tokens
        offsets = []
        if at == 0 and tokens and tokens[0].chosen.text[:1] == " " != piece.text[:1]:
            at = -1  # tokenizers drop the space that an answer begins with
        for token in tokens:
            offsets.append(max(at, 0))
            at += len(token.chosen.text)
        return {
            "tokens": [token.chosen.text for token in tokens],
            "token_logprobs": [token.chosen.logprob for token in tokens],
            "top_logprobs": [{t.text: t.logprob for t in token.top} for token in tokens],
            "text_offset": offsets,
        }
