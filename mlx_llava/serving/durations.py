"""How long something lasts, as Ollama's clients and its users say it."""

from __future__ import annotations

import math
import re

#: What is longer is for ever, too.
LONGEST = 1e8
_UNITS = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ms|s|m|h)")


def as_seconds(duration: float | str) -> float:
    """Takes 300, 5m, 1h30m or 500ms; less than nothing, as -1, is for ever: `math.inf`.

    Raises:
        ValueError: It is none of these.
    """
    text = str(duration).strip()
    whole = text.lstrip("+-")
    try:
        seconds = float(whole)
    except ValueError:
        parts = _PART.findall(whole)
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
        if not parts or "".join(map("".join, parts)) != whole:
            seconds = math.nan
    if math.isnan(seconds):
        message = f"{text[:40]!r} is no time; write it as 5m, 90s or 0, or -1 for ever."
        raise ValueError(message)
    return math.inf if seconds > LONGEST or (seconds and text.startswith("-")) else seconds
