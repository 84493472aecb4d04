"""What is said of an answer as it grows: its text, counts and times. V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_llava.inputs import html as display
from mlx_llava.inputs.inputs import Inputs, in_part


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
        stop: the stop text that ended the answer, or "".
        goes_round: whether the answer was ended because it repeated itself; see ``max_repeats``.
        image_tokens: how many of the prompt's tokens are pictures.
        whole_image_tokens: how many would be if pictures were shown in all their features.
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
    stop: str
    goes_round: bool
    image_tokens: int
    whole_image_tokens: int
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
        figures["image_tokens"] = in_part(figures.pop("whole_image_tokens"), self.image_tokens)
        seconds = {name: f"{value:.3f} s" for name, value in figures.pop("timings").items()}
        figures["peak_memory"] = f"{self.peak_memory:.2f} GB"
        pictures = display.pictures(self.inputs.tiles())
        return pictures + display.texts([self.answer]) + display.table({**figures, **seconds})

    def figures(self) -> dict[str, Any]:
        """What there is to say of an answer when it is complete, for JSON."""
        videos = [
            {"frames": video.frames, "frame_tokens": video.frame_tokens}
            for video in self.inputs.videos
        ]
        return {
            "prompt_tokens": self.prompt_tokens,
            "image_tokens": self.image_tokens,
            "whole_image_tokens": self.whole_image_tokens,
            **({"videos": videos} if videos else {}),
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
