"""What ``text_config`` says about rotary positions, in transformers 4's spelling or 5's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_llava.config_checks import Section, refuse_value
from mlx_llava.known_keys import ROPE_CHANGES

_THETA = 10000.0
_CONTEXT = 2048
_READ = frozenset(
    """
    rope_theta rope_type type factor low_freq_factor high_freq_factor
    original_max_position_embeddings
    """.split()
)
_SECTION = Section("text_config.rope_parameters", _READ, ROPE_CHANGES)


def read_rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """Reads ``rope_theta`` and ``rope_scaling``; null where there is no scaling.

    Raises:
        ValueError: A kind of scaling that is not supported, or one that lacks a number.
    """
    rope = _parameters(data)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        refuse_value("text_config", "rope_type", kind, "'default', 'linear' and 'llama3'")
    _SECTION.refuse_changes(rope)
    theta = rope.get("rope_theta") or data.get("rope_theta") or _THETA
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    needed = ["factor"]
    if kind == "llama3":
        needed += ["low_freq_factor", "high_freq_factor"]
    if missing := [key for key in needed if rope.get(key) is None]:
        raise ValueError(f"rope_type={kind!r} needs {', '.join(missing)} in text_config.")
    scaling = {"rope_type": kind, **{key: rope[key] for key in needed}}
    if kind == "llama3":
        key = "original_max_position_embeddings"  # the outer one wins, as in transformers 5
        context = data.get("max_position_embeddings") or _CONTEXT
        scaling[key] = data.get(key) or rope.get(key) or context
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def unknown_rope_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that nobody here understands."""
    return _SECTION.unknown(_parameters(data))


def _parameters(data: Mapping[str, Any]) -> dict[str, Any]:
    """Where both spellings are given, the older one wins, as in transformers 5."""
    return dict(data.get("rope_scaling") or data.get("rope_parameters") or {})
