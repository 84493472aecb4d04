"""JSON files of a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, or {} where there is none.

    Raises:
        ValueError: The file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected an object.")
    return data


@contextmanager
def sensible_values(name: str | Path) -> Iterator[None]:
    """Turns Python's complaints about values of the wrong kind into one about a checkpoint.

    Config files are data from anywhere: a text where a number belongs is their author's mistake.
    """
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        kind = type(error).__name__
        raise ValueError(
            f"A JSON file of {name} has a value of the wrong kind ({kind}: {error})."
        ) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes an object for people and programs to read."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
