"""Many prompts at once, each with its own pictures: continuous batching.

The rows that run share every matmul; each attends to keys and values of its own length, so that
nothing is padded, and a row's answer is the one it would have alone. A row leaves when its answer
ends, and a waiting one takes its place. B rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import Any, cast

import mlx.core as mx

from mlx_llava.generation.detokenizer import Answer
from mlx_llava.generation.memory import check_request, kv_bytes
from mlx_llava.generation.prompt_cache import Prompt, PromptCache
from mlx_llava.generation.response import GenerationResponse, Meter
from mlx_llava.generation.sampling import LogitsProcessor, Options, Sampler, greedy
from mlx_llava.generation.steps import PREFILL_STEP, choose_token, make_cache, prefill, queues_ahead
from mlx_llava.inputs.processor import Conversation, Inputs, Processor
from mlx_llava.model.cache import Cache, Rows, nbytes
from mlx_llava.model.device import available_memory
from mlx_llava.model.llava import Llava

BATCH_SIZE = 8


@dataclass(frozen=True)
class _Waiting:
    """One prompt that has no place yet."""

    uid: int
    inputs: Inputs
    options: Options
    sampler: Sampler
    processors: list[LogitsProcessor]
    kv_bytes: int  # of the prompt and the longest answer


@dataclass
class _Row:
    """One prompt that is being answered."""

    uid: int
    prompt: Prompt
    answer: Answer
    sampler: Sampler
    processors: list[LogitsProcessor]
    cache: Cache
    kv_bytes: int
    known: int
    max_tokens: int
    seen: mx.array
    tokens: list[int] = field(default_factory=list)
    token: mx.array = field(default_factory=lambda: mx.zeros((1,), mx.int32))
    logprobs: mx.array = field(default_factory=lambda: mx.zeros((1, 1)))
    meter: Meter = field(init=False)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return self.sampler is greedy and not self.processors

    def choose(self, logits: mx.array) -> None:
        """Takes the next token from logits (1, V)."""
        self.token, self.logprobs = choose_token(logits, self.seen, self.sampler, self.processors)
        if self.processors:
            self.seen = mx.concatenate([self.seen, self.token])


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
            kv_bits (int, optional): See `decoding.make_cache`.
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
        self._waiting: deque[_Waiting] = deque()
        self._rows: list[_Row] = []
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
        options = options or Options()
        sampler, processors = options.sampler(), options.logits_processors(self.processor)
        max_tokens = check_request(
            self.model,
            inputs,
            options.max_tokens,
            self.processor.context_length,
            prefill_step=self.prefill_step,
            kv_bits=self.kv_bits,
        )
        options = replace(options, max_tokens=max_tokens)
        uid, self._next_uid = self._next_uid, self._next_uid + 1
        self._waiting.append(
            _Waiting(uid, inputs, options, sampler, processors, self._kv_bytes(inputs, max_tokens))
        )
        return uid

    def _kv_bytes(self, inputs: Inputs, max_tokens: int) -> int:
        positions = inputs.input_ids.shape[1] + max_tokens
        return kv_bytes(
            self.model.config, positions, self.model.language_model.dtype.size, self.kv_bits
        )

    def remove(self, uid: int) -> None:
        """Takes a prompt back, wherever it is; nothing more comes of it."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.uid != uid)
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
            (row.uid, self._respond(row, cast("int", token.item()), logprobs[0]))
            for row, (token, logprobs) in zip(running, ready, strict=True)
        ]
        ended = {uid for uid, response in responses if response.finish_reason}
        for row in running:
            if row.uid in ended and self._keeps_prompts:
                self._reuse.store(row.prompt, row.tokens, row.cache)
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
        started = time.perf_counter()
        rows = [self._row(waiting) for waiting in admitted]
        embeddings = self._reuse.embed([row.prompt for row in rows], [row.known for row in rows])
        mx.eval(embeddings)
        encoded = time.perf_counter()
        for row, embedded in zip(rows, embeddings, strict=True):
            row.meter = Meter(row.prompt.inputs, (encoded - started) / len(rows), row.known)
            language_model = self.model.language_model
            logits = prefill(embedded, language_model, row.cache, self.prefill_step)
            self._rows += self._choose([(row, logits)])

    def _room(self) -> int:
        """How many waiting prompts have a place, and memory beside what the rows will need."""
        places = self.batch_size - len(self._rows)
        if not self._waiting or not places:
            return 0
        promised = (max(0, row.kv_bytes - nbytes(row.cache)) for row in self._rows)
        free = available_memory() - sum(promised)
        needed = accumulate(waiting.kv_bytes for waiting in islice(self._waiting, places))
        # One prompt alone was found to fit when it came.
        return max(sum(total <= free for total in needed), 0 if self._rows else 1)

    def _row(self, waiting: _Waiting) -> _Row:
        prompt, options = self._reuse.prompt(waiting.inputs), waiting.options
        empty = make_cache(self.model.language_model, len(prompt.keys), self.kv_bits)
        cache, known = self._reuse.begin(prompt, empty)
        stops = [*self.processor.template.stops, *options.stop]
        tokenizer, eos_ids = self.processor.tokenizer, self.processor.eos_ids
        return _Row(
            uid=waiting.uid,
            prompt=prompt,
            answer=Answer(tokenizer, eos_ids, stops, options.max_tokens),
            sampler=waiting.sampler,
            processors=waiting.processors,
            cache=cache,
            kv_bytes=waiting.kv_bytes,
            known=known,
            max_tokens=options.max_tokens,
            seen=mx.array([key for key in prompt.keys if isinstance(key, int)], mx.int32),
        )

    def _queue(self, rows: list[_Row]) -> None:
        """Computes, or on a GPU queues, the next token of some rows."""
        if not rows:
            return
        ids = mx.concatenate([row.token for row in rows])[:, None]
        cache = [Rows(layers) for layers in zip(*(row.cache for row in rows), strict=True)]
        logits = self.model.language_model(ids, cache=cache)[:, -1]
        if all(row.is_plain for row in rows):
            tokens, logprobs = choose_token(logits, ids, greedy, ())
            for i, row in enumerate(rows):
                row.token, row.logprobs = tokens[i : i + 1], logprobs[i : i + 1]
            mx.async_eval([(row.token, row.logprobs) for row in rows])
            return
        chosen = self._choose([(row, logits[i : i + 1]) for i, row in enumerate(rows)])
        failed = {row.uid for row in rows} - {row.uid for row in chosen}
        self._rows = [row for row in self._rows if row.uid not in failed]

    def _choose(self, rows: Sequence[tuple[_Row, mx.array]]) -> list[_Row]:
        """Takes the next token of rows from their logits (1, V); returns those that can go on."""
        chosen = []
        for row, logits in rows:
            try:
                row.choose(logits)
            except ValueError as error:
                self._failed.append(AnswerError(row.uid, str(error)))
            else:
                chosen.append(row)
        mx.async_eval([(row.token, row.logprobs) for row in chosen])
        return chosen

    def _respond(self, row: _Row, token: int, logprobs: mx.array) -> GenerationResponse:
        row.tokens.append(token)
        return row.meter.response(token, logprobs, *row.answer.add(token))


def batch_generate(
    model: Llava,
    processor: Processor,
    prompts: Sequence[Conversation],
    images: Sequence[Any] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    prompt_cache: PromptCache | None = None,
    prompt_options: dict[str, Any] | None = None,
    **options: Any,
) -> list[str]:
    """Answers several prompts; each as if it were alone.

    Pictures are read when there is a place for their prompt, not all of them at first.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        prompts (list): What `Processor` takes for a batch.
        images (list, optional): For each prompt, its pictures or None.
        batch_size (int): How many are answered at a time.
        prompt_cache (PromptCache, optional): What to reuse.
        prompt_options (dict, optional): ``raw``, ``system``, ``image_position`` of `Processor`.
        **options: Of `decoding.Options`: for all rows one value, or a list with one for each.

    Returns:
        list[str]: The answers.

    Raises:
        ValueError: A prompt is longer than the context, or `Processor` refuses it.
    """
    rows = split_options(options, len(prompts))
    given = [None] * len(prompts) if images is None else list(images)
    if len(given) != len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts but images for {len(given)}.")
    generator = BatchGenerator(model, processor, batch_size=batch_size, prompt_cache=prompt_cache)
    texts = [""] * len(prompts)
    remaining = zip(prompts, given, rows, strict=True)
    while True:
        for prompt, pictures, own in islice(remaining, generator.free):
            generator.insert(processor(prompt, pictures, **(prompt_options or {})), own)
        if generator.is_idle:
            return texts
        for uid, response in generator.next():
            texts[uid] += response.text


def split_options(options: dict[str, Any], rows: int) -> list[Options]:
    """The options of each row; ``stop`` is a list of texts, or one such list for each."""
    split: list[dict[str, Any]] = [{} for _ in range(rows)]
    for name, value in options.items():
        shared = not isinstance(value, (list, tuple)) or (
            name == "stop" and all(isinstance(text, str) for text in value)
        )
        values = [value] * rows if shared else value
        if len(values) != rows:
            raise ValueError(f"There are {rows} prompts but {len(values)} values of {name}.")
        for row, own in zip(split, values, strict=True):
            row[name] = own
    return [Options(**row) for row in split]


def run(generator: BatchGenerator) -> Iterator[tuple[int, GenerationResponse]]:
    """Everything that comes of what was inserted."""
    while not generator.is_idle:
        yield from generator.next()
