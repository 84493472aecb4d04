"""Many prompts at once, each with its own pictures: continuous batching.

The rows that run share every matmul; each attends to keys and values of its own length, so that
nothing is padded, and a row's answer is the one it would have alone. A row leaves when its answer
ends, and a waiting one takes its place. B rows, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import cast

import mlx.core as mx

from mlx_llava.generation.prompt_cache import PromptCache
from mlx_llava.generation.response import GenerationResponse
from mlx_llava.generation.row import Row, embedded
from mlx_llava.generation.sampling import BATCH_SIZE, Options, greedy
from mlx_llava.generation.steps import PREFILL_STEP, log_softmax, prefill, queues_ahead
from mlx_llava.inputs.processor import Inputs, Processor
from mlx_llava.model.cache import Rows, nbytes
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
        self._keeps_prompts = prompt_cache is not None
        self._reuse = prompt_cache or PromptCache(model)
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._failed: deque[AnswerError] = deque()
        self._next_uid = 0

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
        return row.uid

    def remove(self, uid: int) -> None:
        """Takes a prompt back, wherever it is; nothing more comes of it."""
        self._waiting = deque(row for row in self._waiting if row.uid != uid)
        self._rows = [row for row in self._rows if row.uid != uid]
        self._failed = deque(error for error in self._failed if error.uid != uid)

    def next(self) -> list[tuple[int, GenerationResponse]]:
        """The next token of every row that runs, after which waiting prompts take free places.

        Raises:
            AnswerError: One row has failed and is gone. The others lost nothing: call it again.
        """
        if self._failed:
            raise self._failed.popleft()
        running = list(self._rows)
        ready = [(row.token, row.logprobs) for row in running]
        ahead = queues_ahead()
        if ahead:
            self._queue([row for row in running if len(row.tokens) + 1 < row.max_tokens])
        responses = [
            (row.uid, row.respond(cast("int", token.item()), logprobs[0]))
            for row, (token, logprobs) in zip(running, ready, strict=True)
        ]
        ended = {uid for uid, response in responses if response.finish_reason}
        for row in running:
            if row.uid in ended and self._keeps_prompts:
                row.store(self._reuse)
        self._rows = [row for row in self._rows if row.uid not in ended]
        self._failed = deque(error for error in self._failed if error.uid not in ended)
        if not ahead:
            self._queue(self._rows)
        self._admit()
        return responses

    def _admit(self) -> None:
        """Reads as many waiting prompts as there is room for, their pictures together."""
        admitted = [self._waiting.popleft() for _ in range(self._room())]
        if not admitted:
            return
        for row, embeddings in embedded(admitted, self._reuse):
            logits = prefill(embeddings, self.model.language_model, row.cache, self.prefill_step)
            self._rows += self._choose([(row, logits)])

    def _room(self) -> int:
        """How many waiting prompts have a place, and memory beside what the rows will need."""
        places = self.batch_size - len(self._rows)
        if not self._waiting or not places:
            return 0
        promised = (max(0, row.kv_bytes - nbytes(row.cache)) for row in self._rows)
        free = available_memory() - sum(promised)
        needed = accumulate(row.kv_bytes for row in islice(self._waiting, places))
        # One prompt alone was found to fit when it came.
        return max(sum(total <= free for total in needed), 0 if self._rows else 1)

    def _queue(self, rows: list[Row]) -> None:
        """Computes, or on a GPU queues, the next token of some rows."""
        if not rows:
            return
        ids = mx.concatenate([row.token for row in rows])[:, None]
        cache = [Rows(layers) for layers in zip(*(row.cache for row in rows), strict=True)]
        logits = self.model.language_model(ids, cache=cache)[:, -1]
        if all(row.choose.is_plain for row in rows):
            logprobs = log_softmax(logits)
            tokens = greedy(logprobs)
            for i, row in enumerate(rows):
                row.token, row.logprobs = tokens[i : i + 1], logprobs[i : i + 1]
            mx.async_eval([(row.token, row.logprobs) for row in rows])
            return
        chosen = self._choose([(row, logits[i : i + 1]) for i, row in enumerate(rows)])
        failed = {row.uid for row in rows} - {row.uid for row in chosen}
        self._rows = [row for row in self._rows if row.uid not in failed]

    def _choose(self, rows: Sequence[tuple[Row, mx.array]]) -> list[Row]:
        """Takes the next token of rows from their logits (1, V); returns those that can go on."""
        chosen = []
        for row, logits in rows:
            try:
                row.take(logits)
            except ValueError as error:
                self._failed.append(AnswerError(row.uid, str(error)))
            else:
                chosen.append(row)
        mx.async_eval([(row.token, row.logprobs) for row in chosen])
        return chosen


def run(generator: BatchGenerator) -> Iterator[tuple[int, GenerationResponse]]:
    """Everything that comes of what was inserted."""
    while not generator.is_idle:
        yield from generator.next()
