"""What stands before the API: who may ask, how much may be sent, and for how long.

A web page that someone visits can send requests to servers on the visitor's own machine, also
under a name that it makes point there (DNS rebinding). So names and origins are checked.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_llava.serving.errors import CLOSE, ApiError, busy
from mlx_llava.serving.settings import Settings

#: How many bodies of the greatest length may be held at a time, in whatever number of pieces.
BODIES = 4
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; media-src blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Guard:
    """Refuses requests that should not be, and limits how long the others take.

    Attributes:
        app: what is guarded.
        settings: what the server's owner allows.
        open_paths: where no key is needed.
        seconds: after which a request is cut off, whatever it does.
        count: is told the path and the status of every answer.
    """

    app: ASGIApp
    settings: Settings
    open_paths: Collection[str]
    seconds: float
    count: Callable[[str, int], Any]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no WebSockets; uvicorn answers these with an error

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                self.count(scope["path"], message["status"])
            await send(message)

        try:
            self.check(scope)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, guarded)
            return
        # Where time is over, or the server ends, the connection is closed, and the answer cut off.
        with suppress(asyncio.CancelledError), anyio.move_on_after(self.seconds):
            await self.app(scope, receive, guarded)

    def check(self, scope: Scope) -> None:
        """Raises ApiError for a request that is refused."""
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            # Two readers could see different ends of it (request smuggling, RFC 9112, 6.3).
            message = "A request has either Content-Length or Transfer-Encoding."
            raise ApiError(400, message, headers=CLOSE)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._knows(hosts[0]):
            refusal = "This server does not answer to that name; start it with --allow-host NAME."
            raise ApiError(403, refusal, "host_not_allowed")
        same = (f"http://{hosts[0]}", f"https://{hosts[0]}")
        if headers.get("origin") not in (None, *self.settings.allow_origin, *same):
            message = "Web pages of other servers may not ask here; see --allow-origin."
            raise ApiError(403, message, "origin_not_allowed")
        is_preflight = scope["method"] == "OPTIONS"  # a browser's own question, without the key
        if scope["path"] not in self.open_paths and not is_preflight:
            self._check_key(headers)

    def _knows(self, host: str) -> bool:
        """Whether a Host header names this server: no one else can choose an address."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            settings = self.settings
            if name in ("localhost", *map(str.lower, (settings.host, *settings.allow_host))):
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_key(self, headers: Headers) -> None:
        if self.settings.api_key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":  # it may be sent as Anthropic's clients do
            given = headers.get("x-api-key", "")
        digests = [hashlib.sha256(key.encode()).digest() for key in (given, self.settings.api_key)]
        if not hmac.compare_digest(*digests):
            message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            how = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, "invalid_api_key", headers=how)


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
                late = f"The body took longer than {self.seconds:g} s to arrive."
                raise ApiError(408, late, "timeout", headers=CLOSE) from error
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
        return ApiError(413, message, "request_too_large", headers=CLOSE)
