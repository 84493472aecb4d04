"""Embeddings -> ids: prefill, then one id at a time. What every way of answering shares.

L tokens of the prompt, D decoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import cast

import mlx.core as mx

from mlx_llava.generation.sampling import MAX_TOKENS, LogitsProcessor, Sampler, greedy
from mlx_llava.model.cache import Cache, RollingKVCache, group_size
from mlx_llava.model.device import on_cpu
from mlx_llava.model.llama import LanguageModel

PREFILL_STEP = 2048


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
