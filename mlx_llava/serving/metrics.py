"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_llava.serving.engine import Engine

_PATHS = ("/", "/health", "/metrics", "/v1/chat/completions", "/v1/completions", "/v1/models")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server; names begin with ``mlx_llava_``."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._make(
            Counter, "requests", "Requests, by path and status.", labelnames=("path", "status")
        )
        self._prompt = self._make(Counter, "prompt_tokens", "Tokens of prompts.")
        self._cached = self._make(Counter, "cached_tokens", "Those known from before.")
        self._images = self._make(Counter, "image_tokens", "Those that are pictures.")
        self._generated = self._make(Counter, "generation_tokens", "Tokens of answers.")
        self._prefill = self._make(
            Histogram, "prefill_seconds", "From a prompt to its first token.", buckets=_SECONDS
        )
        self._decode = self._make(
            Histogram, "decode_seconds", "The rest of an answer.", buckets=_SECONDS
        )
        for name, text, value in (
            ("running", "Answers that run.", lambda: engine.running),
            ("places_taken", "Answers that run, wait or are prepared.", lambda: engine.taken),
            ("places", "How many these may be.", lambda: engine.capacity),
        ):
            self._make(Gauge, name, text).set_function(value)

    def _make(self, kind: Any, name: str, text: str, **options: Any) -> Any:
        return kind(f"mlx_llava_{name}", text, registry=self._registry, **options)

    def count_request(self, path: str, status: int) -> None:
        """Counts an answer of HTTP; what anyone makes up as a path counts as one."""
        self._requests.labels(path if path in _PATHS else "other", str(status)).inc()

    def count_answer(self, figures: Mapping[str, Any]) -> None:
        """Counts an answer of the model, by its `GenerationResponse.figures`."""
        self._prompt.inc(figures["prompt_tokens"])
        self._cached.inc(figures["cached_tokens"])
        self._images.inc(figures["image_tokens"])
        self._generated.inc(figures["generation_tokens"])
        timings = figures["timings"]
        self._prefill.observe(timings["encode"] + timings["prefill"])
        self._decode.observe(timings["decode"])

    def text(self) -> bytes:
        return generate_latest(self._registry)
