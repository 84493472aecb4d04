"""The body of a request, in bounded length, time and memory -> what its JSON holds.

A parser makes an object of every key and value, and the whole process waits for it. A request
has few of them, if long ones: so they are counted before they are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anyio
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_llava.serving.errors import ApiError, busy

#: How many bodies of the greatest length may be held at a time, in whatever number of pieces.
BODIES = 4
_CLOSE = {"Connection": "close"}
MAX_TEXTS = MAX_BRACKETS = 100_000
MAX_COMMAS = 250_000  # of which texts have many
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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


def read_json(body: bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ApiError: It is none, or has too many keys and values.
    """
    _check_structure(body)
    text = body.removeprefix(_BYTE_ORDER_MARK)
    try:
        data = from_json(text, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return data


def _check_structure(body: bytes) -> None:
    """Refuses more keys and values than any request needs.

    Each text opens with a quote that follows no backslash, each list and object with a bracket,
    and each value but the first of these follows a comma. Those within texts count as well, but
    pictures in base64 have none.
    """
    for name, found, most in (
        ("texts", (body.count(b'"') - body.count(b'\\"')) // 2, MAX_TEXTS),
        ("commas", body.count(b","), MAX_COMMAS),
        ("brackets", body.count(b"[") + body.count(b"{"), MAX_BRACKETS),
    ):
        if found > most:
            message = f"The body has {found:,} {name}; the limit is {most:,}."
            raise ApiError(400, message, code="request_too_complex")
