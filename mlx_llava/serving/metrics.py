"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_llava.serving.engine import Engine

_PATHS = (
    *("/", "/health", "/metrics", "/v1/chat/completions", "/v1/completions", "/v1/models"),
    *("/api/chat", "/api/generate", "/api/ps", "/api/show", "/api/tags", "/api/version"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/responses"),
)
_TOKENS = {
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Those known from before.",
    "image_tokens": "Those that are pictures.",
    "generation_tokens": "Tokens of answers.",
}
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server; names begin with ``mlx_llava_``."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        ours: dict[str, Any] = {"namespace": "mlx_llava", "registry": self._registry}
        of_seconds = {**ours, "buckets": _SECONDS}
        self._requests = Counter(
            "requests", "Requests, by path and status.", ("path", "status"), **ours
        )
        self._tokens = {name: Counter(name, text, **ours) for name, text in _TOKENS.items()}
        self._prefill = Histogram(
            "prefill_seconds", "From a prompt to its first token.", **of_seconds
        )
        self._decode = Histogram("decode_seconds", "The rest of an answer.", **of_seconds)
        running = Gauge("running", "Answers that run.", **ours)
        running.set_function(lambda: engine.running)
        taken = Gauge("places_taken", "Answers that run, wait or are prepared.", **ours)
        taken.set_function(lambda: engine.taken)
        Gauge("places", "How many these may be.", **ours).set(engine.capacity)

    def count_request(self, path: str, status: int) -> None:
        """Counts an answer of HTTP; what anyone makes up as a path counts as one."""
        self._requests.labels(path if path in _PATHS else "other", str(status)).inc()

    def count_answer(self, figures: Mapping[str, Any]) -> None:
        """Counts an answer of the model, by its `GenerationResponse.figures`."""
        for name, counter in self._tokens.items():
            counter.inc(figures[name])
        timings = figures["timings"]
        self._prefill.observe(timings["encode"] + timings["prefill"])
        self._decode.observe(timings["decode"])

    def text(self) -> bytes:
        return generate_latest(self._registry)
