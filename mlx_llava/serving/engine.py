"""One model's answers: questions come from asyncio, and words go back to it.

Everything of MLX, loading included, happens in the thread of all models (model_thread.py). What
leaves it is plain Python.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, TypeAlias

import anyio
import mlx.core as mx
import numpy as np
from mlx.utils import tree_reduce

from mlx_llava.files import one_line
from mlx_llava.generation.batch import AnswerError, BatchGenerator
from mlx_llava.generation.memory import request_bytes
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.sampling import Options
from mlx_llava.generation.steps import PREFILL_STEP
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.device import on_cpu, release_memory
from mlx_llava.model.llava import Llava
from mlx_llava.model.ranks import rank_here
from mlx_llava.serving.errors import ApiError, busy
from mlx_llava.serving.model_thread import ENDING, ModelThread
from mlx_llava.serving.replies import Piece, Token
from mlx_llava.serving.workers import forget

logger = logging.getLogger(__name__)

#: All of a processor that prompts come of.
_PREPARING = attrgetter(
    *("config", "image_processor", "template", "eos_ids", "tokenizer.spec", "tokenizer.config")
)

#: Takes the pieces of a request's answers, or the error that ends all of them, to who asked; and
#: None when they begin.
Send: TypeAlias = Callable[["Piece | Exception | None"], None]


@dataclass
class ModelFiles:
    """A model's files.

    Attributes:
        name: of the model, as clients know it.
        look: reads all but the weights: what prepares prompts, their bytes, and their number.
        load: reads it whole.
    """

    name: str
    look: Callable[[], tuple[Processor, int, int]]
    load: Callable[[], tuple[Llava, Processor]]


@dataclass(eq=False)
class _Question:
    """Prompts that have not begun, and who wants to hear of them."""

    prompts: Sequence[tuple[Inputs, Options]]
    top_logprobs: int | None
    keep_alive: float
    send: Send


@dataclass
class _Answer:
    """One answer to a request, each of which has a `send` of its own."""

    send: Send
    index: int
    top_logprobs: int | None
    ids: list[int] = field(default_factory=list)
    pending: list[Token] = field(default_factory=list)  # whose text is not out


class Engine:
    """Answers many requests to one model at once.

    Attributes:
        name: of the model.
        thread: in which it runs.
        processor: the model's processor.
        weight_bytes: what the model's weights take; before it is loaded, in its files.
        parameters: how many numbers the model has.
        batch_size: how many answers run at a time.
        capacity: how many answers may run and wait together.
        taken: how many of these places are taken.
        is_loaded: whether the model takes memory.
        keep_alive: for how many seconds it stays loaded where nobody asks.
        last_used: when it was asked or has answered last, by `time.monotonic`.
    """

    def __init__(
        self,
        checkpoint: ModelFiles,
        thread: ModelThread,
        *,
        batch_size: int,
        max_waiting: int,
        prompt_cache_bytes: int,
    ) -> None:
        """Reads what a checkpoint says of its model, and returns when it is ready to be asked."""
        self.name, self.thread = checkpoint.name, thread
        self.batch_size = batch_size
        self.capacity = batch_size + max_waiting
        self.taken = 0
        self.is_loaded = False
        self.keep_alive = math.inf
        self.last_used = 0.0
        self._checkpoint = checkpoint
        self._prompt_cache_bytes = prompt_cache_bytes
        self._generator: BatchGenerator | None = None
        self._questions: list[_Question] = []
        self._answers: dict[int, _Answer] = {}
        self.processor, self.weight_bytes, self.parameters = thread.run(checkpoint.look)
        thread.engines.append(self)

    @property
    def running(self) -> int:
        return min(len(self._answers), self.batch_size)

    def close(self) -> None:
        """Ends the thread and all that runs in it, and waits for it."""
        self.thread.close()

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
        self,
        prompts: Sequence[tuple[Inputs, Options]],
        top_logprobs: int | None,
        deadline: float,
        keep_alive: float = math.inf,
    ) -> AsyncGenerator[Piece, None]:
        """Answers prompts, piece by piece; where nobody listens any more, the model stops.

        Args:
            prompts (list): What to answer, and how; nothing only loads the model.
            top_logprobs (int, optional): See `Request`.
            deadline (float): Of all of it, by `anyio.current_time`.
            keep_alive (float): For how many seconds the model then stays loaded.

        Raises:
            ValueError: A prompt does not fit, or its options make no sense.
            TimeoutError: The time is over.
            ApiError: The model has failed, through no fault of the question.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

        def send(piece: Piece | Exception | None) -> None:
            with suppress(RuntimeError):  # the asker's loop is gone, and the asker with it
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        question = _Question(prompts, top_logprobs, keep_alive, send)
        remaining = 1 + len(prompts)
        self.thread.asking.add(send)
        try:
            self.thread.do(lambda: self._ask(question))
            if self.thread.has_ended:  # perhaps before it saw them
                raise ApiError(503, ENDING)
            while remaining:
                with anyio.fail_after(deadline - anyio.current_time()):
                    piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                remaining -= piece is None or piece.finish_reason is not None
                if piece is not None:
                    yield piece
        finally:
            self.thread.asking.discard(send)
            if remaining:
                self.thread.do(lambda: self._cancel(send))

    def seconds_left(self) -> float:
        """For how long the model stays loaded if nobody asks."""
        unused = time.monotonic() - self.last_used if self.is_idle else 0
        return max(0, self.keep_alive - unused)

    # What follows is for the thread.

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, so that the model could be given back."""
        return self._generator is None or self._generator.is_idle

    @property
    def is_wanted(self) -> bool:
        """Whether questions wait for it."""
        return bool(self._questions)

    def needed_bytes(self) -> int:
        """The memory that waiting questions take, each alone; with the model, if it has none."""
        context, itemsize = self.processor.context_length, 4 if on_cpu() else 2
        needs = (
            request_bytes(
                *(self.processor.config, itemsize, inputs),
                max_tokens=max(0, min(options.max_tokens, context - inputs.positions)),
                prefill_step=PREFILL_STEP,
            )
            for question in self._questions
            for inputs, options in question.prompts
        )
        weights = 0 if self.is_loaded else self.weight_bytes
        return weights + max((sum(parts.values()) for parts in needs), default=0)

    def load(self) -> None:
        """Loads the model, unless it is; raises what `checkpoint.load` does."""
        if self._generator is None:
            model, processor = self._checkpoint.load()
            is_whole = rank_here() is None  # ranks have compared their files
            if is_whole and _PREPARING(processor) != _PREPARING(self.processor):  # has made prompts
                raise ValueError("its files are another model's now; start the server again.")
            self.processor = processor  # on ranks, its config is of their part
            self.weight_bytes = tree_reduce(_added, model.parameters(), 0)
            self._generator = self._new_generator(model)
            self.is_loaded = True
            self.last_used = time.monotonic()

    def unload(self) -> None:
        """Forgets the model and earlier prompts, and gives their memory back to the system."""
        self._generator = None
        release_memory()
        self.is_loaded = False

    def begin(self) -> None:
        """Begins all questions that wait, with the model loaded."""
        questions, self._questions = self._questions, []
        try:
            if questions:
                self.load()
        except Exception as error:
            logger.exception(f"The model {self.name} could not be loaded.")
            why = f"The model {self.name} could not be loaded: {one_line(error)}"
            for question in questions:
                question.send(ApiError(503, why))
            forget(error)
            release_memory()
            return
        for question in questions:
            self._begin(question)

    def step(self) -> None:
        """Takes a step of the answers that run, if there are any."""
        generator = self._generator
        if generator is None or generator.is_idle:
            return
        self.last_used = time.monotonic()
        try:
            responses = generator.next()
        except AnswerError as error:
            self._fail(self._answers[error.uid].send, ValueError(str(error)))
            return
        except Exception as error:
            generator.model.ranks.fail(f"The model has failed: {error}")
            logger.exception("The model has failed; all answers that ran are lost.")
            for send in {answer.send for answer in self._answers.values()}:
                self._fail(send, ApiError(503, f"The model has failed: {error}"))
            self._generator = self._new_generator(generator.model)
            return
        for uid, response in responses:
            self._tell(uid, response)

    def _ask(self, question: _Question) -> None:
        if rank_here() is None:  # the other ranks keep theirs
            self.keep_alive = question.keep_alive
        if not question.prompts and not question.keep_alive:  # which only unloads it
            question.send(None)
            return
        self._questions.append(question)
        self.thread.ask(self)

    def _new_generator(self, model: Llava) -> BatchGenerator:
        cache = PromptCache(model, self._prompt_cache_bytes)
        return BatchGenerator(model, self.processor, batch_size=self.batch_size, prompt_cache=cache)

    def _begin(self, question: _Question) -> None:
        assert self._generator is not None
        self.last_used, send = time.monotonic(), question.send
        try:
            for index, (inputs, options) in enumerate(question.prompts):
                uid = self._generator.insert(inputs, options)
                self._answers[uid] = _Answer(send, index, question.top_logprobs)
        except ValueError as error:
            self._fail(send, error)
        except Exception as error:
            logger.exception("A prompt could not be read.")
            self._fail(send, ApiError(503, f"The prompt could not be read: {error}"))
        else:
            send(None)

    def _cancel(self, send: Send) -> None:
        self._questions = [question for question in self._questions if question.send is not send]
        for uid in [uid for uid, answer in self._answers.items() if answer.send is send]:
            assert self._generator is not None
            self._generator.remove(uid)
            del self._answers[uid]

    def _fail(self, send: Send, error: Exception) -> None:
        self._cancel(send)
        send(error)

    def _tell(self, uid: int, response: GenerationResponse) -> None:
        """Sends what came of an answer, if it is readable."""
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
