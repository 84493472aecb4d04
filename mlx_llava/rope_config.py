"""What ``text_config`` says about rotary positions, in transformers 4's spelling or 5's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_llava.config_checks import Section, refuse_value
from mlx_llava.known_keys import ROPE_CHANGES

_THETA = 10000.0
_CONTEXT = 2048
_READ = """
    rope_theta rope_type type factor low_freq_factor high_freq_factor
    original_max_position_embeddings
"""
_SECTION = Section("text_config.rope_parameters", frozenset(_READ.split()), ROPE_CHANGES)


def read_rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """Reads ``rope_theta`` and ``rope_scaling``; null where there is no scaling.

    Raises:
        ValueError: A kind of scaling that is not supported, or one that lacks a number.
    """
    rope = _parameters(data)
    _SECTION.refuse_changes(rope)
    rope = {key: value for key, value in rope.items() if key in _READ.split()}
    theta = rope.pop("rope_theta", None) or data.get("rope_theta") or _THETA
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind not in ("default", "linear", "llama3"):
        refuse_value("text_config", "rope_type", kind, "'default', 'linear' and 'llama3'")
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    needed = ["factor"]
    if kind == "llama3":
        needed += ["low_freq_factor", "high_freq_factor"]
        key = "original_max_position_embeddings"  # the outer one wins, as in transformers 5
        context = data.get("max_position_embeddings") or _CONTEXT
        rope[key] = data.get(key) or rope.get(key) or context
    if missing := [key for key in needed if rope.get(key) is None]:
        raise ValueError(f"rope_type={kind!r} needs {', '.join(missing)} in text_config.")
    return {"rope_theta": float(theta), "rope_scaling": {"rope_type": kind, **rope}}


def unknown_rope_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that nobody here understands."""
    return _SECTION.unknown(_parameters(data))


def _parameters(data: Mapping[str, Any]) -> dict[str, Any]:
    """Where both spellings are given, the older one wins, as in transformers 5."""
    return dict(data.get("rope_scaling") or data.get("rope_parameters") or {})
