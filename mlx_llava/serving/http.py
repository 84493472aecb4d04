"""What speaks HTTP: uvicorn, for clients that are slow, gone, half-closed or no clients.

Control-C ends it with a reply to everyone. A connection closes where a request's head does not
come, for which uvicorn waits forever. Of very many, the one that has asked for nothing for the
longest gives way to a new one. Who is answered while still sending can send on, and read.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Callable
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from mlx_llava.serving.errors import CLOSE, ApiError, busy

HEAD_SECONDS = 10.0
HEAD_BYTES = 65_536
_OPEN_FILES, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
#: So many connections, slow and idle ones with them; each is an open file.
CONNECTIONS = 512 if _OPEN_FILES == resource.RLIM_INFINITY else min(512, _OPEN_FILES // 2)
#: So long a new connection is no idle one.
NEW_SECONDS = 1.0
#: Each part of a body takes the loop's time, however short it is. So many may be as short as they
#: like, the others have this many bytes on average.
SHORT_PARTS = 10_000
PART_BYTES = 100
#: Between the letters that tell whether a half-closed client is still there.
PROBE_SECONDS = 0.5
#: For a client to send the rest of what nobody reads, and then to take its answer.
LINGER_SECONDS, LINGER_BYTES = 30.0, 200_000_000
#: For clients to take the last words, where the server ends.
LAST_SECONDS = 1.0
#: What every answer begins with, whatever its status.
_BEGINNING = b"HTTP/1.1 "


class HttpServer(uvicorn.Server):
    """Finishes what runs before it ends; asked twice, or when time is over, it cuts that off."""

    def __init__(self, config: uvicorn.Config, seconds: float, stop: Callable[[], None]) -> None:
        """Gives what runs some seconds; `stop` ends all answers, so that each tells its client."""
        super().__init__(config)
        self._seconds = seconds
        self._stop = stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(super().shutdown(sockets))
        left = self._seconds
        while left > 0 and not (self.force_exit or ending.done()):
            await asyncio.wait([ending], timeout=0.1)
            left -= 0.1
        if self.force_exit or not ending.done():
            self.force_exit = True
            await self._cut_off()
        await ending

    async def _cut_off(self) -> None:
        """Ends all answers, then the connections of those who do not take them."""
        self._stop()
        await self._finish()
        for connection in [*self.server_state.connections]:
            connection.transport.abort()
        await self._finish()

    async def _finish(self) -> None:
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=LAST_SECONDS)


class Connection(H11Protocol):
    """Uvicorn's connection, with limits on waiting and errors in OpenAI's shape."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Counted(h11.SERVER, HEAD_BYTES)
        self._late: asyncio.TimerHandle | None = None
        self._waits_since = time.monotonic()
        self._is_half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits for the first request; makes room where there are too many connections."""
        self._lingering = _Lingering(transport, self)
        super().connection_made(cast("asyncio.Transport", self._lingering))
        self._wait_for_head()
        others = [other for other in self._others() if not other.is_closed]
        if len(others) < CONNECTIONS:
            return
        waiting = [other for other in others if other.asks_for_nothing or other.cycle.more_body]
        if waiting:
            min(waiting, key=Connection._patience).transport.close()
        else:
            message = f"There are {CONNECTIONS} connections, and all are being answered."
            self.app = busy(message, CLOSE).response()

    def data_received(self, data: bytes) -> None:
        """Reads; a head that is not whole yet gets no more time."""
        if self._lingering.is_closing():
            self._lingering.drop(data)
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answers a client that sends no more, where it has asked; and looks if it is there.

        A client that is gone looks the same until something is written to it.
        """
        if self.asks_for_nothing or self.cycle.more_body:
            return False
        self._is_half_closed = True
        if not self.cycle.response_started:
            self._probe(self.cycle, _Begun(self.transport))
        return True

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        reply = ApiError(400, msg, headers=CLOSE).response()
        head = h11.Response(status_code=400, headers=reply.raw_headers, reason="Bad Request")
        events = (head, h11.Data(data=bytes(reply.body)), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        if not self.asks_for_nothing:  # of which nothing more comes, for whoever waits for it
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def shutdown(self) -> None:
        """Closes as soon as the request is answered; at once where nobody reads what comes."""
        if self._lingering.is_closing():
            self._lingering.close()
        else:
            super().shutdown()

    def on_response_complete(self) -> None:
        """Waits for the next request, unless none can come."""
        super().on_response_complete()
        self._wait_for_head()
        if self._is_half_closed and self.asks_for_nothing:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def is_closed(self) -> bool:
        """Whether it is, or will be once all is written; one that lingers is not."""
        return self._lingering.transport.is_closing()

    @property
    def is_answered_early(self) -> bool:
        """Whether the last answer is given, to a client that still sends."""
        is_over = self.conn.our_state in (h11.MUST_CLOSE, h11.CLOSED)
        return is_over and self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    @property
    def asks_for_nothing(self) -> bool:
        """Whether there is no request, or all of them have been answered."""
        return self.cycle is None or self.cycle.response_complete

    def _patience(self) -> tuple[bool, float]:
        """How long to bear with a client that keeps the server waiting: the least goes first.

        One that has just come is about to ask, and not idle.
        """
        is_new = time.monotonic() - self._waits_since < NEW_SECONDS
        return not self.asks_for_nothing or is_new, self._waits_since

    def _others(self) -> list[Connection]:
        return [other for other in cast("set[Connection]", self.connections) if other is not self]

    def _probe(self, cycle: RequestResponseCycle, begun: _Begun) -> None:
        """Writes the answer's beginning letter by letter: if the client is gone, that fails."""
        cycle.transport = cast("asyncio.Transport", begun)
        if not cycle.response_started and not cycle.disconnected and begun.write_letter():
            self.loop.call_later(PROBE_SECONDS, self._probe, cycle, begun)

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        if self.conn.their_state is h11.IDLE:
            self._waits_since = time.monotonic()
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class _Counted(h11.Connection):
    """A reader of HTTP for which a body in very many very short parts is none."""

    _parts = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._parts = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._parts, self._bytes = self._parts + 1, self._bytes + len(event.data)
            if self._parts > SHORT_PARTS + self._bytes // PART_BYTES:
                raise h11.RemoteProtocolError("The body comes in too many parts.")
        return event


class _Lingering:
    """A transport that, closed before its client has sent all, first lets it.

    To close with something unread is to reset a connection: the client fails as it sends, and may
    never see its answer (RFC 9112, 9.6).
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self.transport, self._connection = transport, connection
        self._lingers, self._left = False, LINGER_BYTES

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def is_closing(self) -> bool:
        return self._lingers or self.transport.is_closing()

    def close(self) -> None:
        """Says that no more is coming, and closes after a while; at once if closed again."""
        if self.is_closing() or not self._connection.is_answered_early:
            self.transport.close()
            return
        self._lingers = True
        self.transport.write_eof()
        self.transport.resume_reading()
        self._connection.loop.call_later(LINGER_SECONDS, self.transport.close)

    def drop(self, data: bytes) -> None:
        """Takes what nobody reads, up to so much."""
        self._left -= len(data)
        if self._left < 0:
            self.transport.close()


class _Begun:
    """A transport to which an answer's first letters have been written already."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write_letter(self) -> bool:
        self._transport.write(_BEGINNING[self._written : self._written + 1])
        self._written += 1
        return self._written < len(_BEGINNING)

    def write(self, content: bytes) -> None:
        """Writes what has not been written."""
        self._transport.write(content[self._written :])
        self._written = 0
