"""Choosing the next token, as mlx-lm does (its sample_utils.py, version 0.32); V vocabulary.

The few lines are here since importing anything from mlx-lm imports transformers, which takes
seconds, and a server's model would stand still meanwhile.
"""

from __future__ import annotations

import json
import math
import re
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
#: What may be added to a logit at most.
MAX_BIAS = 100
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


def make_logits_processors(
    repetition_penalty: float | None,
    frequency_penalty: float = 0,
    presence_penalty: float = 0,
    logit_bias: Mapping[str, float] | None = None,
    prompt_length: int = 0,
) -> list[LogitsProcessor]:
    """What changes logits before a token is chosen; see `Options`.

    The first penalty is for the last tokens, those of the prompt included
    (https://arxiv.org/abs/1909.05858), the others for what follows the prompt.
    """
    processors: list[LogitsProcessor] = []
    if repetition_penalty:
        penalty = repetition_penalty

        def penalize(seen: mx.array, logits: mx.array) -> mx.array:
            if seen.size:
                last = seen[-REPETITION_CONTEXT:]
                repeated = logits[:, last]
                logits[:, last] = mx.where(repeated < 0, repeated * penalty, repeated / penalty)
            return logits

        processors.append(penalize)
    if frequency_penalty or presence_penalty:

        def penalize_said(seen: mx.array, logits: mx.array) -> mx.array:
            counts = mx.zeros((logits.shape[-1],)).at[seen[prompt_length:]].add(1)
            return logits - frequency_penalty * counts - presence_penalty * (counts > 0)

        processors.append(penalize_said)
    if logit_bias:
        ids, values = mx.array([*map(int, logit_bias)]), mx.array([*logit_bias.values()])
        processors.append(lambda _, logits: logits.at[:, ids].add(values))
    return processors


def _is_bias(number: Any) -> bool:
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    return is_number and -MAX_BIAS <= number <= MAX_BIAS


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
    frequency_penalty: float = option(
        0.0, float, "above 0, a token becomes less likely each time that it is said", ge=-2, le=2
    )
    presence_penalty: float = option(
        0.0, float, "above 0, tokens that were said become less likely", ge=-2, le=2
    )
    logit_bias: Mapping[str, float] | None = option(
        None,
        dict,
        "numbers that are added to the logits of tokens, by their ids",
        {"type": json.loads, "metavar": "JSON"},
    )
    max_repeats: int | None = option(
        None, int, "ends an answer that says the same words so often on end", ge=2
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
        for token, bias in (self.logit_bias or {}).items():
            if not re.fullmatch("[0-9]{1,9}", str(token)) or not _is_bias(bias):
                raise ValueError(
                    f"logit_bias has {token!r:.80}: {bias!r:.80}; it must have ids of tokens, and "
                    f"numbers in -{MAX_BIAS}..{MAX_BIAS}."
                )
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must lie in 0..2^64 - 1.")

    def processors(self, prompt_length: int, vocab_size: int) -> list[LogitsProcessor]:
        """What changes logits of a vocabulary after a prompt whose text is so long.

        Raises:
            ValueError: A token is none of the vocabulary.
        """
        largest = max(map(int, self.logit_bias or ()), default=0)
        if largest >= vocab_size:
            raise ValueError(f"logit_bias has {largest}, of a vocabulary of {vocab_size:,} tokens.")
        return make_logits_processors(
            *(self.repetition_penalty, self.frequency_penalty, self.presence_penalty),
            *(self.logit_bias, prompt_length),
        )

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
