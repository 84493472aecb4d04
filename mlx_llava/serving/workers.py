"""Threads for one kind of work, of which no more is done at a time than may be."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def forget(error: BaseException | None) -> None:
    """Lets go of what the functions that an error came through held, images and bodies say.

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
        outcome: Future[T] = Future()
        outcome.set_running_or_notify_cancel()  # so that who waits cannot end it

        def give_back(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is gone, and with it all who wait
                loop.call_soon_threadsafe(self._free.release)

        outcome.add_done_callback(give_back)
        thread = threading.Thread(
            target=_do, args=(work, outcome), name="mlx_llava worker", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            outcome.set_exception(error)
        return await asyncio.wrap_future(outcome)


def _do(work: Callable[[], T], outcome: Future[T]) -> None:
    try:
        result = work()
    except Exception as error:
        forget(error)
        del work  # the error leads here
        outcome.set_exception(error)
    else:
        outcome.set_result(result)
