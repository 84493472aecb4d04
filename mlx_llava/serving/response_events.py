"""What OpenAI's Responses API tells of an answer: the response, or its stream event by event."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.openai import logprobs
from mlx_llava.serving.replies import Piece, Token, event
from mlx_llava.serving.tools import ForcedTools, Growing


class Response:
    """One answer as it grows: a message, or the call of a function.

    Attributes:
        text: of the message, or the arguments as JSON.
    """

    def __init__(
        self, said: Mapping[str, Any], tools: ForcedTools | None, has_logprobs: bool
    ) -> None:
        """Begins an answer.

        Args:
            said: What its request said, as the response repeats it.
            tools: Of which one has to be called.
            has_logprobs: Whether tokens are told.
        """
        self._head = {**_HEAD, **said, "id": f"resp_{uuid.uuid4().hex}"}
        self._head["created_at"] = int(time.time())
        self._growing, self._has_logprobs = Growing(tools), has_logprobs
        self._tokens: list[Token] = []
        self._item, self._call = uuid.uuid4().hex, f"call_{uuid.uuid4().hex}"
        self._sent, self._is_open = 0, False

    @property
    def text(self) -> str:
        return self._growing.text

    def add(self, piece: Piece) -> str:
        """The text that a piece adds."""
        self._tokens += piece.tokens
        return self._growing.add(piece)

    def body(self, last: Piece) -> dict[str, Any]:
        """The whole response."""
        is_cut = last.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        figures = last.figures
        read, written = figures["prompt_tokens"], figures["generation_tokens"]
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": figures["cached_tokens"]},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        }
        return {
            **self._head,
            "status": status,
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self._whole_item(status)],
            "usage": usage,
        }

    def begin(self) -> Iterator[str]:
        """The events before the first piece."""
        yield self._event("response.created", response=self._head)
        yield self._event("response.in_progress", response=self._head)

    def go_on(self, piece: Piece) -> Iterator[str]:
        """The events of a piece."""
        new = self.add(piece)
        if not self._is_open and (new or piece.finish_reason):
            self._is_open = True
            item = {**self._whole_item("in_progress"), **({} if self._is_call else {"content": []})}
            if self._is_call:
                item["arguments"] = ""
            yield self._event("response.output_item.added", output_index=0, item=item)
            if not self._is_call:
                part = _part("", [])
                yield self._in_item("response.content_part.added", content_index=0, part=part)
        if new and self._is_call:
            yield self._in_item("response.function_call_arguments.delta", delta=new)
        elif new:
            told = self._told(piece.tokens)
            yield self._in_item(
                "response.output_text.delta", content_index=0, delta=new, logprobs=told
            )

    def end(self, last: Piece) -> Iterator[str]:
        """The events after the last piece, but one."""
        if self._is_call:
            said = {"name": self._growing.name, "arguments": self.text}
            yield self._in_item("response.function_call_arguments.done", **said)
        else:
            told = self._told(self._tokens)
            done = {"text": self.text, "logprobs": told}
            yield self._in_item("response.output_text.done", content_index=0, **done)
            part = _part(self.text, told)
            yield self._in_item("response.content_part.done", content_index=0, part=part)
        status = "incomplete" if last.finish_reason == "length" else "completed"
        item = self._whole_item(status)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def last(self, body: Mapping[str, Any]) -> str:
        """The last event, with the whole response."""
        return self._event(f"response.{body['status']}", response=body)

    def fail(self, error: ApiError) -> str:
        """The last event where there is no whole response."""
        failure = {"code": "server_error", "message": str(error)}
        body = {**self._head, "status": "failed", "error": failure}
        return self._event("response.failed", response=body)

    @property
    def _is_call(self) -> bool:
        return self._growing.name is not None

    def _whole_item(self, status: str) -> dict[str, Any]:
        if self._is_call:
            call = {"call_id": self._call, "name": self._growing.name, "arguments": self.text}
            return {"id": f"fc_{self._item}", "type": "function_call", "status": status, **call}
        content = [_part(self.text, self._told(self._tokens))]
        message = {"type": "message", "role": "assistant", "content": content}
        return {"id": f"msg_{self._item}", "status": status, **message}

    def _told(self, tokens: list[Token] | tuple[Token, ...]) -> list[dict[str, Any]]:
        return logprobs(tokens) if self._has_logprobs else []

    def _in_item(self, kind: str, **fields: Any) -> str:
        item_id = f"{'fc' if self._is_call else 'msg'}_{self._item}"
        return self._event(kind, item_id=item_id, output_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        number = self._sent
        self._sent += 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


_HEAD: Mapping[str, Any] = {
    "object": "response",
    "status": "in_progress",
    "background": False,
    "completed_at": None,
    "error": None,
    "incomplete_details": None,
    "output": [],
    "parallel_tool_calls": False,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "usage": None,
    "user": None,
}
