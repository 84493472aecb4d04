"""Choosing the next token; V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx

Sampler: TypeAlias = Callable[[mx.array], mx.array]
LogitsProcessor: TypeAlias = Callable[[mx.array, mx.array], mx.array]


def make_sampler(temp: float, top_p: float, min_p: float, top_k: int) -> Sampler:
    """A function from log-probabilities (1, V) to ids (1,).

    Greedy and plain temperature are done here; all else is mlx-lm's, whose import is slow.
    """
    if temp < 0 or top_k < 0:
        raise ValueError(f"temp is {temp} and top_k is {top_k}; they must be 0 or more.")
    if not (0 <= top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(f"top_p is {top_p} and min_p is {min_p}; they must lie in 0..1.")
    if temp == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    if not (0 < top_p < 1 or min_p or top_k):
        return lambda logprobs: mx.random.categorical(logprobs / temp)
    from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

    sampler: Sampler = mlx_lm_sampler(temp=temp, top_p=top_p, min_p=min_p, top_k=top_k)
    return sampler


def make_logits_processors(repetition_penalty: float | None) -> list[LogitsProcessor]:
    """mlx-lm's repetition penalty over the last 20 tokens, or nothing."""
    if repetition_penalty is None:
        return []
    from mlx_lm.sample_utils import make_logits_processors as mlx_lm_processors

    processors: list[LogitsProcessor] = mlx_lm_processors(repetition_penalty=repetition_penalty)
    return processors
