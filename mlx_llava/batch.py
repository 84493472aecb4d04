"""Several prompts at once, each with its own pictures.

B prompts, L tokens of the longest; shorter ones are padded on the left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx

from mlx_llava.generate import MAX_TOKENS, limit_tokens
from mlx_llava.llava import Llava
from mlx_llava.processor import Conversation, Inputs, Processor
from mlx_llava.streaming import StopMatcher, StreamingDecoder


def batch_generate(
    model: Llava,
    processor: Processor,
    prompts: Sequence[Conversation],
    images: Sequence[Any] | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
) -> list[str]:
    """Answers several prompts with the likeliest tokens; each as if it were alone.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        prompts (list): What `Processor` takes for a batch.
        images (list, optional): For each prompt, its pictures or None.
        max_tokens (int): The longest answer; less if the context is full before.

    Returns:
        list[str]: The answers.

    Raises:
        ValueError: A prompt is longer than the context, or `Processor` refuses it.
    """
    inputs = processor(list(prompts), images)
    rows = [_Row(processor) for _ in prompts]
    for tokens in _steps(model, inputs, processor.context_length, max_tokens):
        for row, token in zip(rows, tokens, strict=True):
            row.add(token)
        if all(row.ended for row in rows):
            break
    return [row.finish() for row in rows]


def _steps(
    model: Llava, inputs: Inputs, context_length: int, max_tokens: int
) -> Iterator[list[int]]:
    """The next token of every row, one step after the other."""
    B, L = inputs.input_ids.shape
    count = limit_tokens(L, max_tokens, context_length)
    mask = mx.ones((B, L), mx.int32) if inputs.attention_mask is None else inputs.attention_mask
    cache = model.language_model.make_cache()
    logits = model.language_model(
        input_embeddings=model.embed(**inputs), attention_mask=mask, cache=cache, last_only=True
    )
    for n in range(count):
        tokens = mx.argmax(logits[:, -1], axis=-1)
        if n + 1 < count:  # queue the next step before this one is waited for
            mask = mx.concatenate([mask, mx.ones((B, 1), mx.int32)], axis=1)
            logits = model.language_model(tokens[:, None], attention_mask=mask, cache=cache)
        mx.async_eval(logits)
        yield cast("list[int]", tokens.tolist())


class _Row:
    """One answer as it grows."""

    def __init__(self, processor: Processor) -> None:
        self.eos_ids = processor.eos_ids
        self.decoder = StreamingDecoder(processor.tokenizer)
        self.matcher = StopMatcher(processor.template.stops)
        self.text, self.ended = "", False

    def add(self, token: int) -> None:
        if self.ended:
            return
        if token in self.eos_ids:
            self.finish()
            return
        text, self.ended = self.matcher.add(self.decoder.add(token))
        self.text += text

    def finish(self) -> str:
        if not self.ended:
            text, stopped = self.matcher.add(self.decoder.flush())
            self.text += text if stopped else text + self.matcher.flush()
            self.ended = True
        return self.text
