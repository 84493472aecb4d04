"""What is said of an answer as it grows: its text, counts and times. V vocabulary."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_llava.inputs import html as display
from mlx_llava.inputs.processor import Inputs


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
