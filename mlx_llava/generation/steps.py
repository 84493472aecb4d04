"""Embeddings -> ids: prefill, then one id at a time. What every way of answering shares.

L tokens of the prompt, D decoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import cast

import mlx.core as mx

from mlx_llava.generation.sampling import MAX_TOKENS, LogitsProcessor, Sampler, greedy
from mlx_llava.model.cache import Cache
from mlx_llava.model.device import on_cpu
from mlx_llava.model.llama import LanguageModel

PREFILL_STEP = 2048


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


def log_softmax(logits: mx.array) -> mx.array:
    """Logits (B, V) -> log-probabilities; in 16 bits, subtracting would make ties."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Chooser:
    """Takes the tokens of one answer from logits.

    Attributes:
        is_plain: whether the likeliest token is taken as it is.
    """

    def __init__(
        self, sampler: Sampler, processors: Sequence[LogitsProcessor], prompt_ids: mx.array
    ) -> None:
        self.is_plain = sampler is greedy and not processors
        self._sampler, self._processors, self._seen = sampler, processors, prompt_ids

    def __call__(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Logits (1, V) -> an id (1,), and the log-probabilities (1, V) it was chosen from."""
        logits = logits.astype(mx.float32)
        for process in self._processors:
            logits = process(self._seen, logits)
        logprobs = log_softmax(logits)
        token = self._sampler(logprobs)
        if self._processors:
            self._seen = mx.concatenate([self._seen, token])
        return token, logprobs


def decode(
    logits: mx.array,
    language_model: LanguageModel,
    cache: Cache,
    choose: Chooser,
    *,
    max_tokens: int,
) -> Generator[tuple[int, mx.array], None, None]:
    """Goes on from the logits (1, V) after a prompt; yields as `generate_step`."""

    def take(logits: mx.array) -> tuple[mx.array, mx.array]:
        token, logprobs = choose(logits)
        mx.async_eval(token, logprobs)
        return token, logprobs

    def following(token: mx.array) -> tuple[mx.array, mx.array]:
        return take(language_model(token[:, None], cache=cache)[:, -1])

    ahead = queues_ahead()
    token, logprobs = take(logits)
    for _ in range(max_tokens - 1):
        queued = following(token) if ahead else None
        yield cast("int", token.item()), logprobs[0]
        token, logprobs = queued or following(token)
    yield cast("int", token.item()), logprobs[0]


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
    choose = Chooser(sampler or greedy, logits_processors, seen)
    logits = prefill(embeddings, language_model, cache, prefill_step)
    yield from decode(logits, language_model, cache, choose, max_tokens=max_tokens)
