"""Choosing the next token; V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

import mlx.core as mx

Sampler: TypeAlias = Callable[[mx.array], mx.array]
LogitsProcessor: TypeAlias = Callable[[mx.array, mx.array], mx.array]


def greedy(logprobs: mx.array) -> mx.array:
    """The likeliest ids (B,) of log-probabilities (B, V)."""
    return mx.argmax(logprobs, axis=-1)


def make_sampler(
    temp: float, top_p: float, min_p: float, top_k: int, seed: int | None = None
) -> Sampler:
    """A function from log-probabilities (1, V) to ids (1,), with its own chance if it has a seed.

    Greedy and plain temperature are done here; all else is mlx-lm's, whose import is slow.
    """
    if temp < 0 or top_k < 0:
        raise ValueError(f"temp is {temp} and top_k is {top_k}; they must be 0 or more.")
    if not (0 <= top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(f"top_p is {top_p} and min_p is {min_p}; they must lie in 0..1.")
    if temp == 0:
        return greedy
    if 0 < top_p < 1 or min_p or top_k:
        from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

        sampler: Sampler = mlx_lm_sampler(temp=temp, top_p=top_p, min_p=min_p, top_k=top_k)
    else:

        def sampler(logprobs: mx.array) -> mx.array:
            return mx.random.categorical(logprobs / temp)

    return sampler if seed is None else _seeded(sampler, seed)


def _seeded(sampler: Sampler, seed: int) -> Sampler:
    """A sampler that draws as if nothing else did."""
    key = mx.random.key(seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        state = cast("list[mx.array]", mx.random.state)
        others = mx.array(state[0])
        state[0][:] = key
        try:
            return sampler(logprobs)
        finally:
            key = mx.array(state[0])
            state[0][:] = others

    return sample


def make_logits_processors(repetition_penalty: float | None) -> list[LogitsProcessor]:
    """mlx-lm's repetition penalty over the last 20 tokens, or nothing."""
    if repetition_penalty is None:
        return []
    from mlx_lm.sample_utils import make_logits_processors as mlx_lm_processors

    processors: list[LogitsProcessor] = mlx_lm_processors(repetition_penalty=repetition_penalty)
    return processors
