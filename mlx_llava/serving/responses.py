"""What OpenAI's clients read: whole answers, pieces of streams, usage, log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from mlx_llava.serving.engine import Piece, Token
from mlx_llava.serving.requests import AnswerRequest


class Reply:
    """The objects in which one request is answered; ``timings`` in them are not OpenAI's."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, request: AnswerRequest) -> None:
        self._request = request
        self._has_logprobs = request.requested_logprobs is not None
        self._written: dict[int, int] = {}  # characters of each answer
        self._prompt = self._cached = self._completion = 0
        self._timings: Mapping[str, float] = {}
        self._head = {
            "id": self.prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": None,
        }

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """All answers in one."""
        answers: dict[int, Piece] = {}
        for piece in pieces:
            self._count(piece)
            before = answers.get(piece.index)
            answers[piece.index] = before.then(piece) if before else piece
        choices = [self._whole_choice(answers[i]) for i in sorted(answers)]
        return {**self._head, "object": self.whole_object, "choices": choices, **self._figures()}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """What a stream tells of a piece."""
        self._count(piece)
        choices = []
        if piece.index not in self._written:
            self._written[piece.index] = 0
            choices += self._opening(piece.index)
        if piece.text or piece.tokens or piece.finish_reason:
            choices.append(self._choice(piece))
        self._written[piece.index] += len(piece.text)
        return [self._chunk([choice]) for choice in choices]

    def last_chunks(self) -> list[dict[str, Any]]:
        """What a stream ends with: the usage, where it was asked for."""
        return [{**self._chunk([]), **self._figures()}] if self._request.includes_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        return {**chunk, "usage": None} if self._request.includes_usage else chunk

    def _count(self, piece: Piece) -> None:
        """Counts an answer that ends; its prompt once, and the time of the first."""
        if not piece.finish_reason:
            return
        self._completion += piece.figures["generation_tokens"]
        if piece.index % self._request.n == 0:
            self._prompt += piece.figures["prompt_tokens"]
            self._cached += piece.figures["cached_tokens"]
        if piece.index == 0:
            self._timings = piece.figures["timings"]

    def _figures(self) -> dict[str, Any]:
        usage = {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }
        return {"usage": usage, "timings": self._timings}

    def _opening(self, index: int) -> list[dict[str, Any]]:  # noqa: ARG002
        """What an answer opens with in a stream."""
        return []

    def _choice(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, answer: Piece) -> dict[str, Any]:
        return self._choice(answer)


class ChatReply(Reply):
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
            {**_logprob(token), "top_logprobs": [*map(_logprob, token.top)]} for token in tokens
        ]
        return {"content": content, "refusal": None}


def _logprob(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": [*token.content]}


class CompletionReply(Reply):
    """Of ``/v1/completions``."""

    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "text": piece.text,
            "index": piece.index,
            "logprobs": self._logprobs(piece, self._written.get(piece.index, 0)),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece, at: int) -> dict[str, Any] | None:
        """Tokens and where each begins in the text, `at` being where the piece does."""
        if not self._has_logprobs:
            return None
        tokens = piece.tokens
        offsets = []
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
