"""Threads for one kind of work, of which no more is done at a time than may be."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def forget(error: BaseException | None) -> None:
    """Lets go of what the functions that an error came through held, pictures and bodies say.

    An error that was handed on is in a circle with them, which Python finds at some later time.
    Functions that run stay as they are; coroutines that wait would end.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Workers:
    """Does work for asyncio.

    A worker stays taken until its work has ended, also where nobody waits for that any more: a
    thread cannot be stopped, and what it holds is not given back before.
    """

    def __init__(self, count: int) -> None:
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
            ended.exception()  # where nobody waits for it, asyncio would log it

        def do(work: Callable[[], T]) -> None:
            try:
                outcome: tuple[Callable[[Any], None], Any] = ended.set_result, work()
            except Exception as error:
                forget(error)
                outcome = ended.set_exception, error
            del work  # the error leads here
            with suppress(RuntimeError):  # the loop is gone, and with it all who wait
                loop.call_soon_threadsafe(tell, *outcome)

        try:
            threading.Thread(target=do, args=(work,), name="mlx_llava worker", daemon=True).start()
        except RuntimeError:
            self._free.release()
            raise
        return await asyncio.shield(ended)
