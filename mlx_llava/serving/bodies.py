"""Limits on what a server reads: how long a body is, how long it takes, how much all hold."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_llava.serving.errors import ApiError, busy

#: How many bodies of the greatest length may be held at a time, in whatever number of pieces.
BODIES = 4
_CLOSE = {"Connection": "close"}


@dataclass
class BodyLimit:
    """Counts the bodies of requests while these are answered.

    Attributes:
        app: reads them, and raises what `receive` raises.
        max_bytes: the longest.
        seconds: how long one may take to arrive.
    """

    app: ASGIApp
    max_bytes: int
    seconds: float
    _held: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        size = 0
        is_complete = False
        until = anyio.current_time() + self.seconds

        async def limited() -> Message:
            nonlocal size, is_complete
            if is_complete:
                return await receive()
            if not size and int(Headers(scope=scope).get("content-length", 0)) > self.max_bytes:
                raise self._too_large()
            try:
                with anyio.fail_after(until - anyio.current_time()):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(
                    408,
                    f"The body took longer than {self.seconds:g} s to arrive.",
                    code="timeout",
                    headers=_CLOSE,
                ) from error
            is_complete = not message.get("more_body", False)
            length = len(message.get("body", b""))
            size, self._held = size + length, self._held + length
            if size > self.max_bytes:
                raise self._too_large()
            if self._held > BODIES * self.max_bytes:
                raise busy("Too much is being sent at once.")
            return message

        try:
            await self.app(scope, limited, send)
        finally:
            self._held -= size

    def _too_large(self) -> ApiError:
        message = f"The body has more than {self.max_bytes:,} bytes."
        return ApiError(413, message, code="request_too_large", headers=_CLOSE)
