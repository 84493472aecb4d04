"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
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
_GAUGES: Mapping[str, tuple[str, Callable[[Engine], float]]] = {
    "running": ("Answers that run.", lambda engine: engine.running),
    "places_taken": ("Answers that run, wait or are prepared.", lambda engine: engine.taken),
    "places": ("How many these may be.", lambda engine: engine.capacity),
    "loaded": ("Whether the model is in memory.", lambda engine: engine.is_loaded),
}
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server; names begin with ``mlx_llava_``."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._registry = CollectorRegistry()
        ours: dict[str, Any] = {"namespace": "mlx_llava", "registry": self._registry}
        of_model: dict[str, Any] = {**ours, "labelnames": ("model",)}
        of_seconds = {**of_model, "buckets": _SECONDS}
        self._requests = Counter(
            "requests", "Requests, by path and status.", ("path", "status"), **ours
        )
        self._tokens = {name: Counter(name, text, **of_model) for name, text in _TOKENS.items()}
        self._prefill = Histogram(
            "prefill_seconds", "From a prompt to its first token.", **of_seconds
        )
        self._decode = Histogram("decode_seconds", "The rest of an answer.", **of_seconds)
        gauges = {name: Gauge(name, text, **of_model) for name, (text, _) in _GAUGES.items()}
        for model, engine in engines.items():
            for figure in (*self._tokens.values(), self._prefill, self._decode):
                figure.labels(model)  # which is 0 from the beginning
            for name, (_, value) in _GAUGES.items():
                gauges[name].labels(model).set_function(partial(value, engine))

    def count_request(self, path: str, status: int) -> None:
        """Counts an answer of HTTP; what anyone makes up as a path counts as one."""
        self._requests.labels(path if path in _PATHS else "other", str(status)).inc()

    def count_answer(self, model: str, figures: Mapping[str, Any]) -> None:
        """Counts an answer of a model, by its `GenerationResponse.figures`."""
        for name, counter in self._tokens.items():
            counter.labels(model).inc(figures[name])
        timings = figures["timings"]
        self._prefill.labels(model).observe(timings["encode"] + timings["prefill"])
        self._decode.labels(model).observe(timings["decode"])

    def text(self) -> bytes:
        return generate_latest(self._registry)
