"""Many prompts at once, each with its own pictures: continuous batching.

The rows that run share every matmul; each attends to keys and values of its own length, and its
answer is the one it would have alone. A row leaves when its answer ends, and a waiting one takes
its place. V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, islice

import mlx.core as mx

from mlx_llava.generation.memory import kv_bytes
from mlx_llava.generation.orders import Orders
from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.row import Row, embedded
from mlx_llava.generation.sampling import BATCH_SIZE, Options, greedy
from mlx_llava.generation.steps import (
    PREFILL_STEP,
    PromptProgress,
    begin,
    log_softmax,
    queues_ahead,
)
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.processor import Processor
from mlx_llava.model.batch_cache import make_batch_cache
from mlx_llava.model.device import available_memory
from mlx_llava.model.llava import Llava


class AnswerError(ValueError):
    """One answer cannot go on; the others can.

    Attributes:
        uid: whose it is.
    """

    def __init__(self, uid: int, message: str) -> None:
        super().__init__(message)
        self.uid = uid


class BatchGenerator:
    """Answers prompts as they come, several at a time.

    `insert` prompts at any time, call `next` for what was made of them, until `is_idle`.
    """

    def __init__(
        self,
        model: Llava,
        processor: Processor,
        *,
        batch_size: int = BATCH_SIZE,
        prompt_cache: PromptCache | None = None,
        kv_bits: int | None = None,
        prefill_step: int = PREFILL_STEP,
        prompt_progress_callback: PromptProgress | None = None,
    ) -> None:
        """Sets up an empty batch.

        Args:
            model (Llava): The model.
            processor (Processor): Its processor.
            batch_size (int): How many prompts are answered at a time.
            prompt_cache (PromptCache, optional): What to reuse, and to keep for later. Without
                one, pictures are still encoded together and once.
            kv_bits (int, optional): See `make_cache`.
            prefill_step (int): The length of the chunks in which prompts are read.
            prompt_progress_callback (callable, optional): See `stream_generate`; is told of all
                prompts that take a place together.

        Raises:
            ValueError: The batch size is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"The batch size is {batch_size}; it must be at least 1.")
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.kv_bits = kv_bits
        self.prefill_step = prefill_step
        self._tell = prompt_progress_callback
        self._keeps_prompts = prompt_cache is not None
        self._reuse = prompt_cache or PromptCache(model)
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._cache = make_batch_cache(kv_bits)  # has them under the same numbers
        self._failed: deque[AnswerError] = deque()
        self._next_uid = 0
        self._order = Orders(model.ranks)
        self._order(
            "batch",
            cache=prompt_cache and prompt_cache.order,
            batch_size=batch_size,
            kv_bits=kv_bits,
            prefill_step=prefill_step,
        )

    @property
    def free(self) -> int:
        """How many more prompts would be answered at once."""
        return self.batch_size - len(self._rows) - len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether every prompt has been answered."""
        return not (self._rows or self._waiting or self._failed)

    def insert(self, inputs: Inputs, options: Options | None = None) -> int:
        """Adds a prompt.

        Args:
            inputs (Inputs): One row, of the processor.
            options (Options, optional): How to answer it.

        Returns:
            int: The number by which `next` and `remove` know it.

        Raises:
            ValueError: It does not fit context or memory, or its options make no sense.
        """
        row = Row(
            *(self.model, self.processor, inputs, options or Options()),
            uid=self._next_uid,
            prefill_step=self.prefill_step,
            kv_bits=self.kv_bits,
        )
        self._next_uid += 1
        self._waiting.append(row)
        self._order("insert", inputs, options or Options())
        return row.uid

    def remove(self, uid: int) -> None:
        """Takes a prompt back, wherever it is; nothing more comes of it."""
        self._order("remove", uid=uid)
        self._waiting = deque(row for row in self._waiting if row.uid != uid)
        for row in [row for row in self._rows if row.uid == uid]:
            self._leave(row)
        self._failed = deque(error for error in self._failed if error.uid != uid)

    def next(self) -> list[tuple[int, GenerationResponse]]:
        """What comes of one step of the rows that run; then waiting prompts take free places.

        Raises:
            AnswerError: One row has failed and is gone. The others lost nothing: call it again.
        """
        with self.model.ranks.working():
            self._order("next")
            return self._next()

    def _next(self) -> list[tuple[int, GenerationResponse]]:
        if self._failed:
            raise self._failed.popleft()
        # Where all rows are constrained, what they force is read together with what they chose.
        ahead = queues_ahead() and any(
            row.choose.constraint is None and len(row.tokens) + 1 < row.max_tokens
            for row in self._rows
        )
        ready = [(row, row.choice) for row in self._rows if row.choice is not None]
        if ahead:
            self._step()
        responses = [
            response
            for row, choice in ready
            for response in self._attempt(row, partial(row.read, choice, was_fed=ahead))
        ]
        if ahead:
            self._take()
        else:
            self._step()
        return responses + self._admit()

    def _attempt(
        self, row: Row, go_on: Callable[[], Sequence[GenerationResponse]]
    ) -> list[tuple[int, GenerationResponse]]:
        """Goes on with a row, which leaves where it ends or fails."""
        try:
            responses = go_on()
        except ValueError as error:
            self._failed.append(AnswerError(row.uid, str(error)))
            self._leave(row)
            return []
        if responses and responses[-1].finish_reason:
            self._leave(row, keep=self._keeps_prompts)
        return [(row.uid, response) for response in responses]

    def _leave(self, row: Row, keep: bool = False) -> None:
        if row not in self._rows:
            return
        number = self._rows.index(row)
        if keep:
            row.cache = self._cache.extract(number)
            row.store(self._reuse)
        self._cache.leave(number)
        self._rows[number] = self._rows[-1]
        self._rows.pop()

    def _step(self) -> None:
        """Lets the model read what rows have for it; on a GPU, this is queued."""
        if not self._rows:
            return
        counts = [row.feed.size for row in self._rows]
        ids = mx.concatenate([row.feed for row in self._rows])[:, None]
        logits = self.model.language_model(ids, cache=self._cache.step(counts))[:, -1]
        if not all(row.choose.is_plain for row in self._rows):
            for row, end in zip(self._rows, accumulate(counts), strict=True):
                row.logits = logits[end - 1 : end]
            self._take()
            return
        logprobs = log_softmax(logits)
        tokens = self.model.ranks.agreed(greedy(logprobs))
        for i, row in enumerate(self._rows):
            row.feed = tokens[i : i + 1]
            row.choice = row.feed, logprobs[i : i + 1]
        mx.async_eval([row.choice for row in self._rows])

    def _take(self) -> None:
        """Chooses tokens from the logits that there are."""
        for row in list(self._rows):
            self._attempt(row, row.draw)
        drawn = {row: row.drawn[0] for row in self._rows if row.drawn is not None}
        for row, token in zip(drawn, self.model.ranks.agreed_each([*drawn.values()]), strict=True):
            row.take(token)
        mx.async_eval([row.choice for row in self._rows if row.choice is not None])

    def _admit(self) -> list[tuple[int, GenerationResponse]]:
        """Reads as many waiting prompts as there is room for, their pictures together."""
        may_fit = self._waiting and len(self._rows) < self.batch_size
        fitting = self.model.ranks.decide(self._room) if may_fit else 0
        admitted = [self._waiting.popleft() for _ in range(fitting)]
        responses: list[tuple[int, GenerationResponse]] = []
        for row, embeddings in embedded(admitted, self._reuse) if admitted else ():
            tell = None if self._tell is None else partial(self._tell_of, admitted, row)
            responses += self._attempt(row, partial(self._begin, row, embeddings, tell))
            self._take()
        return responses

    def _tell_of(self, admitted: Sequence[Row], row: Row, processed: int, _: int) -> None:
        """Tells what has been read of the prompts up to one; what is forced after it is not one."""
        assert self._tell is not None
        lengths = [one.unread for one in admitted]
        before = sum(lengths[: admitted.index(row)])
        self._tell(before + min(processed, row.unread), sum(lengths))

    def _begin(
        self, row: Row, embeddings: mx.array, tell: PromptProgress | None
    ) -> list[GenerationResponse]:
        forced, row.logits = begin(
            *(embeddings, self.model.language_model, row.cache, row.choose),
            max_tokens=row.max_tokens,
            prefill_step=self.prefill_step,
            tell=tell,
        )
        self._cache.join(row.cache)
        self._rows.append(row)
        row.cache = []
        if forced:
            mx.eval(row.logits)
        return row.say(forced)

    def _room(self) -> int:
        """How many waiting prompts have a place, and memory beside what the rows will need."""
        running = [row.length for row in self._rows]
        waiting = [row.length for row in islice(self._waiting, self.batch_size - len(running))]
        free = available_memory() + self._cache.nbytes
        fitting = sum(
            self._bytes([*running, *waiting[:n]]) <= free for n in range(1, len(waiting) + 1)
        )
        # One prompt alone was found to fit when it came.
        return max(fitting, 0 if running else min(1, len(waiting)))

    def _bytes(self, lengths: Sequence[int]) -> int:
        """The keys and values of rows that have become so long."""
        positions, dtype = self._cache.positions(lengths), self.model.language_model.dtype
        return kv_bytes(self.model.config, positions, dtype.size, self.kv_bits)


def run(generator: BatchGenerator) -> Iterator[tuple[int, GenerationResponse]]:
    """Everything that comes of what was inserted."""
    while not generator.is_idle:
        yield from generator.next()
