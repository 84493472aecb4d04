"""Embeddings -> ids: prefill, then one id at a time. What every way of answering shares.

L tokens of the prompt, D decoder width, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, cast

import mlx.core as mx

from mlx_llava.generation.json_schema import JsonConstraint
from mlx_llava.generation.memory import check_prompt
from mlx_llava.generation.sampling import (
    LogitsProcessor,
    Sampler,
    greedy,
    make_logits_processors,
    make_sampler,
)
from mlx_llava.inputs import html as display
from mlx_llava.inputs.processor import Inputs, Processor
from mlx_llava.model.cache import Cache, RollingKVCache, group_size
from mlx_llava.model.device import on_cpu
from mlx_llava.model.llama import LanguageModel
from mlx_llava.model.llava import Llava

MAX_TOKENS = 512
PREFILL_STEP = 2048


@dataclass(frozen=True)
class GenerationResponse:
    """What one step of `stream_generate` yields.

    Attributes:
        text: the text that became readable with this token.
        token: its id.
        logprobs: the log-probabilities it was chosen from, (V,).
        prompt_tokens: the length of the prompt, placeholders of pictures included.
        prompt_tps: tokens per second of prefill.
        generation_tokens: how many tokens were generated so far.
        generation_tps: tokens per second of decoding.
        peak_memory: the most memory that MLX held so far, in GB.
        finish_reason: None, or ``stop`` or ``length`` in the last response.
        image_tokens: how many of the prompt's tokens are pictures.
        cached_tokens: how many of the prompt's tokens were known from before.
        preprocess_seconds: reading pictures, cutting them, tokenising.
        encode_seconds: vision tower and projector.
        prefill_seconds: reading the prompt, up to the first token.
        decode_seconds: everything after the first token.
        answer: all text so far.
        inputs: the prompt.
    """

    text: str
    token: int
    logprobs: mx.array
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None
    image_tokens: int
    cached_tokens: int
    preprocess_seconds: float
    encode_seconds: float
    prefill_seconds: float
    decode_seconds: float
    answer: str
    inputs: Inputs = field(repr=False)

    def _repr_html_(self) -> str:
        """What Jupyter shows: the pictures, the answer, the timings."""
        figures = self.figures()
        seconds = {name: f"{value:.3f} s" for name, value in figures.pop("timings").items()}
        figures["peak_memory"] = f"{self.peak_memory:.2f} GB"
        pictures = display.pictures(self.inputs.tiles())
        return pictures + display.texts([self.answer]) + display.table({**figures, **seconds})

    def figures(self) -> dict[str, Any]:
        """What there is to say of an answer when it is complete, for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "image_tokens": self.image_tokens,
            "cached_tokens": self.cached_tokens,
            "generation_tokens": self.generation_tokens,
            "finish_reason": self.finish_reason,
            "timings": {
                "preprocess": self.preprocess_seconds,
                "encode": self.encode_seconds,
                "prefill": self.prefill_seconds,
                "decode": self.decode_seconds,
            },
            "peak_memory": self.peak_memory,
        }


class Meter:
    """Counts and times one answer from the moment when its prompt has been embedded."""

    def __init__(self, inputs: Inputs, encode_seconds: float, cached_tokens: int = 0) -> None:
        self._inputs = inputs
        self._encode_seconds = encode_seconds
        self._cached_tokens = cached_tokens
        self._started = time.perf_counter()
        self._first: float | None = None
        self._count = 0
        self._answer = ""

    def response(
        self, token: int, logprobs: mx.array, text: str, finish_reason: str | None
    ) -> GenerationResponse:
        """What to say of the next token, which has just been made."""
        now = time.perf_counter()
        self._first = self._first or now
        self._count += 1
        self._answer += text
        prefill_seconds, decode_seconds = self._first - self._started, now - self._first
        prompt_tokens = self._inputs.input_ids.shape[1]
        return GenerationResponse(
            text=text,
            token=token,
            logprobs=logprobs,
            prompt_tokens=prompt_tokens,
            prompt_tps=(prompt_tokens - self._cached_tokens) / max(prefill_seconds, 1e-9),
            generation_tokens=self._count,
            generation_tps=(self._count - 1) / max(decode_seconds, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            image_tokens=sum(self._inputs.image_tokens),
            cached_tokens=self._cached_tokens,
            preprocess_seconds=self._inputs.seconds,
            encode_seconds=self._encode_seconds,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            answer=self._answer,
            inputs=self._inputs,
        )


_OPTIONAL = ("seed", "repetition_penalty", "json_schema")


@dataclass(frozen=True)
class Options:
    """How to answer, for one prompt; see `mlx_llava.generate.stream_generate`."""

    max_tokens: int = MAX_TOKENS
    temp: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    json_schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Checks kinds, since options may come from a file or over a network."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        is_list = isinstance(self.stop, (list, tuple))
        if not is_list or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a text or a list of texts.")
        for name in ("max_tokens", "top_k", "seed"):
            self._check(name, Integral, "a whole number")
        for name in ("temp", "top_p", "min_p", "repetition_penalty"):
            self._check(name, Real, "a number")
        self._check("json_schema", Mapping, "an object")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must lie in 0..2^64 - 1.")

    def _check(self, name: str, kind: type, words: str) -> None:
        value = getattr(self, name)
        optional = value is None and name in _OPTIONAL
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if kind is Real and fits:
            fits = -math.inf < value < math.inf
        if not optional and not fits:
            raise ValueError(f"{name} is {value!r}; it must be {words}.")

    def sampler(self) -> Sampler:
        """What chooses the next token."""
        return make_sampler(self.temp, self.top_p, self.min_p, self.top_k, self.seed)

    def logits_processors(self, processor: Processor) -> list[LogitsProcessor]:
        """What changes the logits before that, for one answer."""
        processors = make_logits_processors(self.repetition_penalty)
        if self.json_schema is not None:
            vocab_size = processor.config.text_config.vocab_size
            ends = processor.eos_ids
            processors.append(
                JsonConstraint(self.json_schema, processor.tokenizer, ends, vocab_size)
            )
        return processors


class ContextError(ValueError):
    """A prompt is longer than the model's context."""


def limit_tokens(prompt_tokens: int, max_tokens: int, context_length: int) -> int:
    """How many tokens can be made; raises ContextError where there is room for none."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1.")
    if prompt_tokens >= context_length:
        raise ContextError(
            f"The prompt has {prompt_tokens} tokens and the model's context is {context_length}; "
            "use fewer or smaller images, or a shorter text."
        )
    return min(max_tokens, context_length - prompt_tokens)


def check_request(
    model: Llava,
    inputs: Inputs,
    max_tokens: int,
    context_length: int,
    *,
    prefill_step: int = PREFILL_STEP,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
) -> int:
    """How many tokens the answer to one prompt can have.

    Raises:
        ValueError: It is not one prompt, it is longer than the context, or memory is too small.
    """
    rows, prompt_tokens = inputs.input_ids.shape
    if rows != 1:
        raise ValueError(f"One prompt can be answered at a time; the inputs hold {rows}.")
    max_tokens = limit_tokens(prompt_tokens, max_tokens, context_length)
    check_prompt(
        model.config,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        tiles=sum(inputs.image_tiles),
        itemsize=model.language_model.dtype.size,
        prefill_step=prefill_step,
        kv_bits=kv_bits,
        max_kv_size=max_kv_size,
    )
    return max_tokens


def make_cache(
    language_model: LanguageModel,
    prompt_tokens: int,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
) -> Cache:
    """An empty cache for one prompt.

    Args:
        language_model (LanguageModel): The decoder.
        prompt_tokens (int): The length of the prompt.
        kv_bits (int, optional): Stores keys and values in 2, 4 or 8 bits (mlx-lm's cache).
        max_kv_size (int, optional): Stores that many positions at most: the prompt, its system
            text and pictures with it, and the last ones of the answer.

    Raises:
        ValueError: The two exclude each other, or do not fit the model or the prompt.
    """
    config = language_model.config
    if max_kv_size is None:
        if kv_bits is None:
            return language_model.make_cache()
        return _quantized_cache(len(language_model.layers), config.dims_per_head, kv_bits)
    if kv_bits is not None:
        raise ValueError("A cache has either kv_bits or max_kv_size.")
    if config.sliding_window is not None:
        raise ValueError(
            f"max_kv_size is {max_kv_size}, but this model has a sliding window of its own, "
            f"{config.sliding_window} tokens."
        )
    if max_kv_size <= prompt_tokens:
        raise ValueError(
            f"max_kv_size is {max_kv_size} and the prompt, which is kept, has {prompt_tokens} "
            "tokens; use more, or a shorter prompt."
        )
    return [RollingKVCache(max_kv_size, prompt_tokens) for _ in language_model.layers]


def _quantized_cache(layers: int, dims: int, bits: int) -> Cache:
    """mlx-lm's cache of codes, in groups as long as the head allows."""
    size = group_size(dims)
    if size is None or bits not in (2, 4, 8):
        raise ValueError(
            f"kv_bits is {bits} and a head has {dims} dimensions; known: 2, 4 or 8, for a "
            "multiple of 32."
        )
    from mlx_lm.models.cache import QuantizedKVCache

    return [QuantizedKVCache(size, bits) for _ in range(layers)]


def prefill(
    embeddings: mx.array, language_model: LanguageModel, cache: Cache, step: int
) -> mx.array:
    """Reads a prompt in chunks, so that memory does not grow with its square.

    Returns:
        mx.array: The logits after its last token, (1, V).
    """
    length = embeddings.shape[1]
    for start in range(0, length - step, step):
        language_model(input_embeddings=embeddings[:, start : start + step], cache=cache)
        mx.eval([(layer.keys, layer.values) for layer in cache])
        mx.clear_cache()
    rest = (length - 1) // step * step
    logits = language_model(input_embeddings=embeddings[:, rest:], cache=cache, last_only=True)
    return logits[:, -1]


def queues_ahead() -> bool:
    """Whether to queue a step before the last one's token is read.

    It keeps a GPU busy. On a CPU, where a step is done when the call returns, it would only delay
    the token, and do a step too many.
    """
    return not on_cpu()


def choose_token(
    logits: mx.array, seen: mx.array, sampler: Sampler, processors: Sequence[LogitsProcessor]
) -> tuple[mx.array, mx.array]:
    """Logits (B, V) -> ids (B,) and the log-probabilities (B, V) that they were chosen from."""
    logits = logits.astype(mx.float32)  # in 16 bits, subtracting would make ties
    for process in processors:
        logits = process(seen, logits)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sampler(logprobs), logprobs


def generate_step(
    embeddings: mx.array,
    language_model: LanguageModel,
    *,
    cache: Cache | None = None,
    max_tokens: int = MAX_TOKENS,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prompt_ids: mx.array | None = None,
    prefill_step: int = PREFILL_STEP,
) -> Generator[tuple[int, mx.array], None, None]:
    """Continues a prompt, one id at a time.

    Args:
        embeddings (mx.array): The prompt, (1, L, D); `Llava.embed` makes them.
        language_model (LanguageModel): The decoder.
        cache (list, optional): What came before; is extended.
        max_tokens (int): How many tokens to make.
        sampler (callable, optional): Log-probabilities -> ids. Default: the likeliest.
        logits_processors (list of callables): (ids so far, logits) -> logits, as in mlx-lm.
        prompt_ids (mx.array, optional): The prompt's text for the logits processors, (L,).
        prefill_step (int): The length of the chunks in which the prompt is read.

    Yields:
        tuple[int, mx.array]: A token and the log-probabilities that it was chosen from, (V,).
    """
    cache = language_model.make_cache() if cache is None else cache
    seen = mx.zeros((0,), mx.int32) if prompt_ids is None else prompt_ids

    def choose(logits: mx.array) -> tuple[mx.array, mx.array]:
        token, logprobs = choose_token(logits, seen, sampler or greedy, logits_processors)
        mx.async_eval(token, logprobs)
        return token, logprobs

    def following(token: mx.array) -> tuple[mx.array, mx.array]:
        nonlocal seen
        if logits_processors:
            seen = mx.concatenate([seen, token])
        return choose(language_model(token[:, None], cache=cache)[:, -1])

    ahead = queues_ahead()
    token, logprobs = choose(prefill(embeddings, language_model, cache, prefill_step))
    for _ in range(max_tokens - 1):
        queued = following(token) if ahead else None
        yield cast("int", token.item()), logprobs[0]
        token, logprobs = queued or following(token)
    yield cast("int", token.item()), logprobs[0]
