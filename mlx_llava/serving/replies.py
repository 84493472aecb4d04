"""What comes of a request, whatever API it was made in: pieces of answers, and what they took."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any


@dataclass(frozen=True)
class Token:
    """A token and its log-probability; one of an answer, with the likeliest at its position."""

    text: str
    content: bytes
    logprob: float
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What came of one step or more of one answer.

    Attributes:
        index: which of the answers.
        start: how many characters of the answer come before.
        text: what became readable.
        tokens: the tokens of that text, where they were requested.
        finish_reason: in the last piece.
        figures: of the answer so far, in the first piece and in the last; see
            `GenerationResponse.figures`.
        stop: the stop text that ended the answer, in the last piece.
    """

    index: int
    start: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None
    figures: Mapping[str, Any]
    stop: str = ""


class Reply:
    """The answers to one request, as they are made.

    Attributes:
        prompt_tokens: of the prompts of those that have ended, and
        cached_tokens: how many of these were read before.
        generation_tokens: of the answers that have ended.
        timings: of the first one.
        began: when it was asked for, by `time.monotonic_ns`.
    """

    def __init__(self, pieces: AsyncGenerator[Piece, None], n: int) -> None:
        """Takes the pieces of all of them, `n` to each prompt."""
        self._pieces, self._n = pieces, n
        self._first: list[Piece] = []
        self.began = time.monotonic_ns()
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.timings: Mapping[str, float] = {}

    @property
    def beginning(self) -> Mapping[str, Any]:
        """The figures of an answer that has begun; see `Piece`."""
        return next((piece.figures for piece in self._first), {})

    async def begin(self) -> None:
        """Waits for the first piece, before which errors have a status of HTTP's."""
        with suppress(StopAsyncIteration):  # there is none where nothing is asked
            self._first.append(await anext(self._pieces))

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Those of all answers in turn."""
        async with aclosing(self._pieces):
            for piece in self._first:
                yield self._counted(piece)
            async for piece in self._pieces:
                yield self._counted(piece)

    async def whole(self) -> list[Piece]:
        """All answers, each in one piece."""
        answers: dict[int, list[Piece]] = {}
        async for piece in self.pieces():
            answers.setdefault(piece.index, []).append(piece)
        return [_joined(answers[index]) for index in sorted(answers)]

    def _counted(self, piece: Piece) -> Piece:
        """Counts an answer that ends; its prompt once."""
        if piece.finish_reason:
            self.generation_tokens += piece.figures["generation_tokens"]
            if piece.index % self._n == 0:
                self.prompt_tokens += piece.figures["prompt_tokens"]
                self.cached_tokens += piece.figures["cached_tokens"]
            if piece.index == 0:
                self.timings = piece.figures["timings"]
        return piece


def event(data: Mapping[str, Any], name: str = "") -> str:
    """An event of a stream, as browsers read them."""
    named = f"event: {name}\n" if name else ""
    return f"{named}data: {as_json(data)}\n\n"


def as_json(data: Mapping[str, Any]) -> str:
    """The text of an object, laid out as constrained answers are."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


def _joined(pieces: list[Piece]) -> Piece:
    text = "".join(piece.text for piece in pieces)
    tokens = tuple(chain.from_iterable(piece.tokens for piece in pieces))
    return replace(pieces[-1], start=0, text=text, tokens=tokens)
