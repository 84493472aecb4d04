"""What ``text_config`` says about rotary positions, in transformers 4's spelling or 5's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_llava.model.config_checks import Section, refuse_value
from mlx_llava.model.known_keys import ROPE_CHANGES

_THETA = 10000.0
_CONTEXT = 2048
_KEYS = """rope_theta rope_type type factor low_freq_factor high_freq_factor
    original_max_position_embeddings"""
_ROPE = Section("text_config.rope_parameters", frozenset(_KEYS.split()), ROPE_CHANGES)
#: A factor for each frequency, as GGUF files of Llama 3.1 have; Phi-3 has others where a prompt is
#: longer than the context that it was trained with first.
_FACTORS = ("short_factor", "long_factor", "attention_factor")
#: The kinds of scaling, and the numbers that each needs.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def read_rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """Reads ``rope_theta`` and ``rope_scaling``; null where there is no scaling.

    Raises:
        ValueError: A kind of scaling that is not supported, or one that lacks a number.
    """
    rope = _parameters(data)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _NEEDED:
        refuse_value("text_config", "rope_type", kind, ", ".join(_NEEDED))
    needed = _NEEDED[kind]
    read = _FACTORS if kind == "longrope" else needed
    _ROPE.check({key: value for key, value in rope.items() if key not in read})
    theta = rope.get("rope_theta") or data.get("rope_theta") or _THETA
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    if missing := [key for key in needed if rope.get(key) is None]:
        raise ValueError(f"rope_type={kind!r} needs {', '.join(missing)} in text_config.")
    scaling = {"rope_type": kind, **{key: rope[key] for key in needed}}
    if kind != "linear":
        key = "original_max_position_embeddings"  # the outer one wins, as in transformers 5
        context = data.get("max_position_embeddings") or _CONTEXT
        scaling[key] = data.get(key) or rope.get(key) or context
    if kind == "longrope":
        factor = rope.get("factor") or context / scaling[key]
        own = _attention_factor(factor, scaling[key])
        scaling["attention_factor"] = rope.get("attention_factor") or own
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _attention_factor(factor: float, context: int) -> float:
    """What LongRoPE multiplies rotated queries and keys with, where no file says so."""
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0


def check_factors(scaling: Mapping[str, Any] | None, dims: int) -> None:
    """Raises ValueError for ``longrope`` without a factor for each pair of a head's dimensions.

    Args:
        scaling (dict, optional): What `read_rope` gives as ``rope_scaling``.
        dims (int): The width of a head.
    """
    if scaling is None or scaling["rope_type"] != "longrope":
        return
    for key in _NEEDED["longrope"]:
        factors = scaling[key]
        if not isinstance(factors, list) or len(factors) != dims // 2:
            found = len(factors) if isinstance(factors, list) else factors
            _ROPE.refuse(key, found, f"lists of {dims // 2} factors")
        if not all(map(_is_positive, factors)):
            _ROPE.refuse(key, factors, "positive numbers")
    if not _is_positive(factor := scaling["attention_factor"]):
        _ROPE.refuse("attention_factor", factor, "positive numbers")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0


def context_of(scaling: Mapping[str, Any] | None, positions: int) -> int:
    """How many of so many positions can be told apart.

    Linear scaling stretches them. Where LongRoPE has other factors for long prompts, which would
    rotate anew what is cached, its context is that of short ones.
    """
    if scaling is None:
        return positions
    kind = scaling["rope_type"]
    if kind == "linear":
        return int(positions * scaling["factor"])
    if kind == "longrope" and scaling["short_factor"] != scaling["long_factor"]:
        return min(positions, scaling["original_max_position_embeddings"])
    return positions


def unknown_rope_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that nobody here understands."""
    return _ROPE.unknown(_parameters(data), "text_config.")


def _parameters(data: Mapping[str, Any]) -> dict[str, Any]:
    """Where both spellings are given, the older one wins, as in transformers 5."""
    return dict(data.get("rope_scaling") or data.get("rope_parameters") or {})
