"""Choosing the next token, as mlx-lm does (its sample_utils.py, version 0.32); V vocabulary.

The few lines are here since importing anything from mlx-lm imports transformers, which takes
seconds, and a server's model would stand still meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx

from mlx_llava.signatures import check_bounds, documented, option

if TYPE_CHECKING:
    from mlx_llava.generation.json_schema import JsonConstraint
    from mlx_llava.inputs.processor import Processor

Sampler: TypeAlias = Callable[[mx.array], mx.array]
LogitsProcessor: TypeAlias = Callable[[mx.array, mx.array], mx.array]

MAX_TOKENS = 512
#: How many prompts are answered at a time.
BATCH_SIZE = 8
#: How many tokens back a repetition counts.
REPETITION_CONTEXT = 20


def greedy(logprobs: mx.array) -> mx.array:
    """The likeliest ids (B,) of log-probabilities (B, V)."""
    return mx.argmax(logprobs, axis=-1)


def make_sampler(
    temp: float, top_p: float, min_p: float, top_k: int, seed: int | None = None
) -> Sampler:
    """A function from log-probabilities (1, V) to ids (1,), with its own chance if it has a seed.

    What is unlikely is left out by `top_p`, then by `min_p`, then by `top_k`.
    """
    if temp == 0:
        return greedy
    key = None if seed is None else mx.random.key(seed)

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal key
        drawn = None
        if key is not None:
            key, drawn = mx.random.split(key)
        if 0 < top_p < 1:
            logprobs = keep_top_p(logprobs, top_p)
        if min_p:
            logprobs = keep_min_p(logprobs, min_p)
        if 0 < top_k < logprobs.shape[-1]:
            logprobs = keep_top_k(logprobs, top_k)
        return mx.random.categorical(logprobs * (1 / temp), key=drawn)

    return sampler


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Leaves (B, V) those before which the likelier ones have less than `top_p` of all chance."""
    ascending = mx.sort(logprobs, axis=-1)
    chances = mx.exp(ascending.astype(mx.float32))
    likelier = mx.cumsum(chances, axis=-1, reverse=True, inclusive=False)
    total = likelier[..., :1] + chances[..., :1]
    left_out = (likelier >= top_p * total).sum(axis=-1, keepdims=True)
    return _at_least(logprobs, mx.take_along_axis(ascending, left_out, axis=-1))


def keep_min_p(logprobs: mx.array, min_p: float) -> mx.array:
    """Leaves (B, V) those that are at least `min_p` times as likely as the likeliest."""
    return _at_least(logprobs, logprobs.max(axis=-1, keepdims=True) + math.log(min_p))


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Leaves (B, V) the `top_k` likeliest, fewer than V."""
    others = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    never = mx.array(-math.inf, logprobs.dtype)
    return mx.put_along_axis(logprobs, others, never, axis=-1)


def _at_least(logprobs: mx.array, least: mx.array) -> mx.array:
    return mx.where(logprobs < least, -math.inf, logprobs)


def make_logits_processors(repetition_penalty: float | None) -> list[LogitsProcessor]:
    """A penalty on the last tokens (https://arxiv.org/abs/1909.05858), or nothing."""
    if not repetition_penalty:
        return []
    penalty = repetition_penalty

    def penalize(seen: mx.array, logits: mx.array) -> mx.array:
        if seen.size:
            last = seen[-REPETITION_CONTEXT:]
            repeated = logits[:, last]
            logits[:, last] = mx.where(repeated < 0, repeated * penalty, repeated / penalty)
        return logits

    return [penalize]


#: What an option may be, and how that is said.
_KINDS: Mapping[type, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    dict: (Mapping, "an object"),
}


@documented
@dataclass(frozen=True)
class Options:
    """How to answer one prompt.

    `stream_generate` has a keyword for each, a line of a prompts file a key, and commands a flag.
    """

    max_tokens: int = option(
        MAX_TOKENS, int, "the longest answer; less if the context is full before"
    )
    temp: float = option(0.0, float, "temperature; 0 takes the likeliest token", ge=0)
    top_p: float = option(
        0.0,
        float,
        "samples from the likeliest tokens of this total probability; 0 is off",
        ge=0,
        le=1,
    )
    min_p: float = option(
        0.0,
        float,
        "drops tokens below this fraction of the likeliest one's probability",
        ge=0,
        le=1,
    )
    top_k: int = option(0, int, "samples from that many likeliest tokens; 0 is off", ge=0)
    repetition_penalty: float | None = option(
        None, float, "above 1, tokens of the last 20 become less likely", ge=0
    )
    seed: int | None = option(None, int, "makes sampling repeatable")
    stop: Sequence[str] = option(
        (),
        str,
        "texts that end the answer, beside the template's own",
        {"action": "append", "default": [], "help": "a text that ends the answer; repeatable"},
    )
    json_schema: Mapping[str, Any] | None = option(
        None,
        dict,
        "makes the answer JSON of this schema, if it is not cut off",
        {
            "type": str,
            "metavar": "FILE",
            "help": "a JSON schema, or its text, that the answer follows",
        },
    )

    @classmethod
    def take(cls, keywords: dict[str, Any]) -> Options:
        """What there is of options among keywords, from which it is removed."""
        names = [one.name for one in fields(cls) if one.name in keywords]
        return cls(**{name: keywords.pop(name) for name in names})

    def __post_init__(self) -> None:
        """Checks kinds and bounds: options may come from a file or over a network."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        is_list = isinstance(self.stop, (list, tuple))
        if not is_list or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a text or a list of texts.")
        for one in fields(self):
            value, kind = getattr(self, one.name), one.metadata["kind"]
            if kind not in _KINDS or (value is None and one.default is None):
                continue
            number, words = _KINDS[kind]
            fits = isinstance(value, number) and not isinstance(value, bool)
            if not fits or (kind is float and not -math.inf < value < math.inf):
                raise ValueError(f"{one.name} is {value!r}; it must be {words}.")
        check_bounds(self)
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must lie in 0..2^64 - 1.")

    def sampler(self) -> Sampler:
        """What chooses the next token."""
        return make_sampler(self.temp, self.top_p, self.min_p, self.top_k, self.seed)

    def constraint(self, processor: Processor) -> JsonConstraint | None:
        """What one answer has to follow; compiled for the first time, that can take a second."""
        if self.json_schema is None:
            return None
        from mlx_llava.generation.json_schema import JsonConstraint

        vocab_size = processor.config.text_config.vocab_size
        return JsonConstraint(self.json_schema, processor.tokenizer, processor.eos_ids, vocab_size)
