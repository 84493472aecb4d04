"""The one thread that owns a model: questions come from asyncio, and words go back to it.

Everything of MLX, loading included, happens in this thread. What leaves it is plain Python.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeAlias

import anyio
import mlx.core as mx
import numpy as np
from mlx.utils import tree_reduce

from mlx_llava.generation.batch import AnswerError, BatchGenerator
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.processor import Inputs, Processor
from mlx_llava.model.llava import Llava
from mlx_llava.serving.errors import ApiError, busy
from mlx_llava.serving.replies import Piece, Token

logger = logging.getLogger(__name__)

#: After so many steps without a pause, memory that MLX keeps for reuse is given back.
CLEAR_EVERY = 256
ENDING = "The server is ending."

#: Takes the pieces of a request's answers, or the error that ends all of them, to who asked.
Send: TypeAlias = Callable[[Piece | Exception], None]


@dataclass
class _Answer:
    """One answer to a request, each of which has a `send` of its own."""

    send: Send
    index: int
    top_logprobs: int | None
    ids: list[int] = field(default_factory=list)
    pending: list[Token] = field(default_factory=list)  # whose text is not out


class Engine:
    """Answers many requests at once, in a thread of its own.

    Attributes:
        processor: the model's processor.
        weight_bytes: what the model's weights take.
        batch_size: how many answers run at a time.
        capacity: how many answers may run and wait together.
        taken: how many of these places are taken.
        has_ended: whether the thread is gone, and nothing will be answered any more.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Llava, Processor]],
        *,
        batch_size: int,
        max_waiting: int,
        prompt_cache_bytes: int,
    ) -> None:
        """Loads a model, and returns when it is ready."""
        self.batch_size = batch_size
        self.capacity = batch_size + max_waiting
        self.taken = 0
        self.has_ended = False
        self._prompt_cache_bytes = prompt_cache_bytes
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._answers: dict[int, _Answer] = {}
        ready: Future[Processor] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(load, ready), name="mlx_llava engine", daemon=True
        )
        self._thread.start()
        try:
            self.processor = ready.result()
        except Exception:
            self._thread.join()
            raise

    @property
    def running(self) -> int:
        return min(len(self._answers), self.batch_size)

    def stop(self) -> None:
        """Asks the thread to end; answers that run are cut off after its next step."""
        self._inbox.put(None)

    def close(self) -> None:
        """Ends the thread, and waits for it."""
        self.stop()
        self._thread.join()

    @contextmanager
    def place(self, count: int) -> Iterator[None]:
        """Takes places for some answers, while they are prepared and made.

        Raises:
            ApiError: There are not so many.
        """
        if self.taken + count > self.capacity:
            raise busy(f"The server is busy: {self.taken} of {self.capacity} places are taken.")
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count

    async def answer(
        self, prompts: Sequence[tuple[Inputs, Options]], top_logprobs: int | None, deadline: float
    ) -> AsyncGenerator[Piece, None]:
        """Answers prompts, piece by piece; where nobody listens any more, the model stops.

        Args:
            prompts (list): What to answer, and how.
            top_logprobs (int, optional): See `Request`.
            deadline (float): Of all of it, by `anyio.current_time`.

        Raises:
            ValueError: A prompt does not fit, or its options make no sense.
            TimeoutError: The time is over.
            ApiError: The model has failed, through no fault of the question.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        def send(piece: Piece | Exception) -> None:
            with suppress(RuntimeError):  # the asker's loop is gone, and the asker with it
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self._inbox.put(lambda: self._begin(prompts, top_logprobs, send))
        if self.has_ended:  # perhaps before it saw them
            raise ApiError(503, ENDING)
        remaining = len(prompts)
        try:
            while remaining:
                with anyio.fail_after(deadline - anyio.current_time()):
                    piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                remaining -= piece.finish_reason is not None
                yield piece
        finally:
            if remaining:
                self._inbox.put(lambda: self._cancel(send))

    def _run(self, load: Callable[[], tuple[Llava, Processor]], ready: Future[Processor]) -> None:
        try:
            model, processor = load()
            self._generator = self._new_generator(model, processor)
        except BaseException as error:
            ready.set_exception(error)
        else:
            self.weight_bytes = tree_reduce(_added, model.parameters(), 0)
            ready.set_result(processor)
            try:
                self._serve()
            finally:
                self._end()
        finally:
            _end_streams()

    def _serve(self) -> None:
        for step in count(1):
            if step % CLEAR_EVERY == 0:
                mx.clear_cache()  # buffers of all the lengths that there were
            while self._generator.is_idle or not self._inbox.empty():
                if self._generator.is_idle:
                    mx.clear_cache()
                command = self._inbox.get()
                if command is None:
                    return
                command()
            self._step()

    def _end(self) -> None:
        """Leaves nobody waiting, however it came to the end."""
        self.has_ended = True
        self._fail_all(ENDING)
        while not self._inbox.empty():
            if command := self._inbox.get():
                command()

    def _new_generator(self, model: Llava, processor: Processor) -> BatchGenerator:
        cache = PromptCache(model, self._prompt_cache_bytes)
        return BatchGenerator(model, processor, batch_size=self.batch_size, prompt_cache=cache)

    def _begin(
        self, prompts: Sequence[tuple[Inputs, Options]], top_logprobs: int | None, send: Send
    ) -> None:
        if self.has_ended:
            send(ApiError(503, ENDING))
            return
        try:
            for index, (inputs, options) in enumerate(prompts):
                uid = self._generator.insert(inputs, options)
                self._answers[uid] = _Answer(send, index, top_logprobs)
        except ValueError as error:
            self._fail(send, error)
        except Exception as error:
            logger.exception("A prompt could not be read.")
            self._fail(send, ApiError(503, f"The prompt could not be read: {error}"))

    def _cancel(self, send: Send) -> None:
        for uid in [uid for uid, answer in self._answers.items() if answer.send is send]:
            self._generator.remove(uid)
            del self._answers[uid]

    def _fail(self, send: Send, error: Exception) -> None:
        self._cancel(send)
        send(error)

    def _fail_all(self, why: str) -> None:
        for send in {answer.send for answer in self._answers.values()}:
            self._fail(send, ApiError(503, why))

    def _step(self) -> None:
        try:
            responses = self._generator.next()
        except AnswerError as error:
            self._fail(self._answers[error.uid].send, ValueError(str(error)))
            return
        except Exception as error:
            logger.exception("The model has failed; all answers that ran are lost.")
            self._generator.model.ranks.fail(f"The model has failed: {error}")
            self._fail_all(f"The model has failed: {error}")
            self._generator = self._new_generator(self._generator.model, self.processor)
            return
        for uid, response in responses:
            answer = self._answers[uid]
            tokens, reason = self._tokens(answer, response), response.finish_reason
            if response.text or reason:
                start = len(response.answer) - len(response.text)
                figures = response.figures() if reason or not start else {}
                piece = Piece(
                    *(answer.index, start, response.text, tokens, reason, figures),
                    stop=response.stop if reason else "",
                )
                answer.send(piece)
            if reason:
                del self._answers[uid]

    def _tokens(self, answer: _Answer, response: GenerationResponse) -> tuple[Token, ...]:
        """The tokens whose text is out; those of a stop text, and the end itself, never are."""
        top = answer.top_logprobs
        if top is None:
            return ()
        if response.token not in self.processor.eos_ids:
            answer.ids.append(response.token)
            answer.pending.append(self._token(response.token, response.logprobs, top))
        if not response.text and not response.finish_reason:
            return ()
        out = len(answer.pending)
        if response.finish_reason == "stop":
            before = len(answer.ids) - out
            decode = self.processor.tokenizer.decode
            while out and len(decode(answer.ids[: before + out])) > len(response.answer):
                out -= 1
        tokens, answer.pending = answer.pending[:out], answer.pending[out:]
        return tuple(tokens)

    def _token(self, chosen: int, logprobs: mx.array, top: int) -> Token:
        """A token in its place, from log-probabilities (V,)."""
        values = np.array(logprobs)
        best = np.argpartition(-values, top)[:top]
        ranked = best[np.argsort(-values[best])]
        likeliest = [int(i) for i in ranked if np.isfinite(values[i])]
        top_tokens = tuple(self._likelihood(i, values) for i in likeliest)
        return replace(self._likelihood(chosen, values), top=top_tokens)

    def _likelihood(self, token: int, values: np.ndarray[Any, Any]) -> Token:
        content = self.processor.tokenizer.bytes_of(token)
        return Token(content.decode(errors="replace"), content, float(values[token]))


def _added(total: int, array: mx.array) -> int:
    return total + array.nbytes


def _end_streams() -> None:
    """Ends what MLX runs for this thread; left to itself, it may abort the process at exit."""
    mx.synchronize()
    if hasattr(mx, "clear_streams"):  # before MLX 0.31, streams did not belong to threads
        mx.clear_streams()
