"""Threads for one kind of work, of which no more is done at a time than may be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """Does work for asyncio.

    A worker stays taken until its work has ended, also where nobody waits for that any more: a
    thread cannot be stopped, and what it holds is not given back before.
    """

    def __init__(self, count: int) -> None:
        """Takes note of how many work at a time."""
        self._free = asyncio.Semaphore(count)

    async def run(self, work: Callable[[], T]) -> T:
        """Does some work in a thread, as soon as there is a worker.

        Where the caller is cancelled before that, it is not done.
        """
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[T] = loop.create_future()

        def tell(report: Callable[[Any], None], outcome: Any) -> None:
            self._free.release()
            report(outcome)

        def do() -> None:
            try:
                outcome: tuple[Callable[[Any], None], Any] = ended.set_result, work()
            except Exception as error:
                outcome = ended.set_exception, error
            with suppress(RuntimeError):  # the loop is gone, and with it all who wait
                loop.call_soon_threadsafe(tell, *outcome)

        try:
            threading.Thread(target=do, name="mlx_llava worker", daemon=True).start()
        except RuntimeError:
            self._free.release()
            raise
        return await asyncio.shield(ended)
