"""What speaks HTTP: uvicorn, ending by Control-C with a reply to everyone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn

#: For clients to take the last words.
LAST_SECONDS = 1.0


class HttpServer(uvicorn.Server):
    """Finishes what runs before it ends; asked twice, or when time is over, it cuts that off."""

    def __init__(self, config: uvicorn.Config, seconds: float, stop: Callable[[], None]) -> None:
        """Prepares; see uvicorn.

        Args:
            config (uvicorn.Config): Of the server.
            seconds (float): How long what runs may take.
            stop (callable): Ends all answers, so that each tells its client.
        """
        super().__init__(config)
        self._seconds = seconds
        self._stop = stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends."""
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
