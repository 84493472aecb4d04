"""The one thread in which MLX runs: there models are loaded, answer, and are given back.

Questions come from asyncio as commands. A model that is not loaded is loaded for those that wait
for it; if memory does not hold it beside the others, those unused longest go, once they have
nothing to answer. Until then later questions wait behind it, whatever model they are for, so that
none waits for ever.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx

from mlx_llava.model.device import available_memory
from mlx_llava.serving.errors import ApiError

if TYPE_CHECKING:
    from mlx_llava.serving.engine import Engine, Send

#: After so many steps without a pause, memory that MLX keeps for reuse is given back.
CLEAR_EVERY = 256
ENDING = "The server is ending."

T = TypeVar("T")


class ModelThread:
    """Runs the models of some engines.

    Attributes:
        engines: all of them.
        asking: who waits for answers, to be told where none will come.
        has_ended: whether nothing will be answered any more.
    """

    def __init__(self) -> None:
        """Starts it."""
        self.engines: list[Engine] = []
        self.asking: set[Send] = set()
        self.has_ended = False
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._asked: deque[Engine] = deque()  # those with questions that wait, in their order
        self._thread = threading.Thread(target=self._run, name="mlx_llava models", daemon=True)
        self._thread.start()

    def do(self, command: Callable[[], object]) -> None:
        """Has something done there, soon."""
        self._inbox.put(command)

    def run(self, work: Callable[[], T]) -> T:
        """Does some work there, and waits for it."""
        outcome: Future[T] = Future()

        def attempt() -> None:
            try:
                outcome.set_result(work())
            except Exception as error:
                outcome.set_exception(error)

        self.do(attempt)
        return outcome.result()

    def stop(self) -> None:
        """Tells everyone that there will be no answer, and asks the thread to end."""
        self._inbox.put(None)
        self._refuse_all()

    def close(self) -> None:
        """Ends the thread, and waits for it."""
        self.stop()
        self._thread.join()

    def ask(self, engine: Engine) -> None:
        """Begins what waits for an engine, after what waited before; to be called there."""
        if engine not in self._asked:
            self._asked.append(engine)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            self.has_ended = True  # whoever asks from now on sees it
            self._refuse_all()
            _end_streams()

    def _refuse_all(self) -> None:
        for send in self.asking.copy():
            send(ApiError(503, ENDING))

    def _serve(self) -> None:
        for step in count(1):
            if step % CLEAR_EVERY == 0:
                mx.clear_cache()  # buffers of all the lengths that there were
            while (is_idle := self._is_idle()) or not self._inbox.empty():
                if is_idle:
                    mx.clear_cache()
                try:
                    command = self._inbox.get(timeout=self._unload_unused())
                except queue.Empty:
                    continue
                if command is None:
                    return
                command()
                self._begin()
            self._unload_unused()
            for engine in self.engines:
                engine.step()
            self._begin()

    def _is_idle(self) -> bool:
        return all(engine.is_idle for engine in self.engines)

    def _begin(self) -> None:
        """Begins questions, model by model in the order in which they were asked for."""
        while self._asked and self._has_room(self._asked[0]):
            self._asked.popleft().begin()

    def _has_room(self, engine: Engine) -> bool:
        """Whether a model may be loaded, or go on, now that others have made room for it."""
        others = [other for other in self.engines if other.is_loaded and other is not engine]
        idle = sorted((o for o in others if o.is_idle), key=lambda other: other.last_used)
        while engine.is_wanted and others and available_memory() < engine.needed_bytes():
            if not idle:
                return engine.is_loaded
            idle[0].unload()
            others.remove(idle.pop(0))
        return True

    def _unload_unused(self) -> float | None:
        """Unloads models whose time is over; tells in how many seconds the next one's is."""
        seconds = math.inf
        for engine in self.engines:
            if engine.is_loaded and engine.is_idle:
                left = engine.seconds_left()
                if left:
                    seconds = min(seconds, left)
                else:
                    engine.unload()
        return None if math.isinf(seconds) else seconds


def _end_streams() -> None:
    """Ends what MLX runs for this thread; left to itself, it may abort the process at exit."""
    mx.synchronize()
    if hasattr(mx, "clear_streams"):  # before MLX 0.31, streams did not belong to threads
        mx.clear_streams()
