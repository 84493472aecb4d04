"""Checks on the content of config files: what would change the maths is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from fnmatch import translate
from functools import cache
from typing import Any, NoReturn, TypeVar

from mlx_llava.model.known_keys import HARMLESS

Config = TypeVar("Config")
#: Rows of known_keys.py: what keys do, the values with which they do nothing, their names.
Changes = tuple[tuple[str, tuple[object, ...], str], ...]


@cache
def _pattern(names: str) -> re.Pattern[str]:
    return re.compile("|".join(translate(name) for name in names.split()))


def _is_one_of(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether a value, or each of a list's, is among others or empty; true is not 1."""
    if isinstance(value, list):
        return all(_is_one_of(item, neutral) for item in value)
    return value == {} or any(
        value == other and (value is True) == (other is True) for other in neutral
    )


@dataclass(frozen=True)
class Section:
    """A part of config.json.

    Attributes:
        where: its name.
        keys: what this package reads.
        changes: what is known to change the maths where it is not read.
        allowed: of keys that it reads, all values that it knows.
    """

    where: str
    keys: AbstractSet[str]
    changes: Changes
    allowed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def check(self, data: Mapping[str, Any]) -> None:
        """Raises ValueError for values that are not known, and keys that change the maths."""
        for key, allowed in self.allowed.items():
            if data.get(key) is not None and data[key] not in allowed:
                *others, last = map(repr, allowed)
                expected = f"{', '.join(others)} and {last}" if others else last
                refuse_value(self.where, key, data[key], expected)
        found = [
            f"{key}={_short(value)} ({meaning})"
            for key, value in self._others(data).items()
            for meaning, neutral, names in self.changes
            if _pattern(names).match(key) and not _is_one_of(value, neutral)
        ]
        if found:
            raise ValueError(
                f"{self.where} has what changes the maths and mlx_llava does not support: "
                f"{', '.join(found)}."
            )

    def build(self, cls: type[Config], data: Mapping[str, Any]) -> Config:
        """Makes a config of the keys that it has; null stands for a default that is not null."""
        values = {}
        for part in fields(cls):  # type: ignore[arg-type]
            value, default = data.get(part.name), part.default
            if part.name not in data or (value is None and default is not None):
                continue
            kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
            if type(default) in kinds and not isinstance(value, (*kinds[type(default)], tuple)):
                refuse_value(self.where, part.name, value, f"a {type(default).__name__}")
            values[part.name] = value
        return cls(**values)

    def unknown(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that are neither read, nor known, nor off (null, false, empty)."""
        known = _pattern(" ".join(names for _, _, names in self.changes))
        return {
            key: value
            for key, value in self._others(data).items()
            if not known.match(key) and not (value is None or value is False or value in ([], {}))
        }

    def _others(self, data: Mapping[str, Any]) -> dict[str, Any]:
        read, harmless = {*self.keys, *self.allowed}, _pattern(HARMLESS)
        return {k: value for k, value in data.items() if k not in read and not harmless.match(k)}


def unknown_warning(unknown: Mapping[str, Any]) -> list[str]:
    """The one warning about keys that are not known, if there are any."""
    if not unknown:
        return []
    named = ", ".join(f"{key}={_short(value)}" for key, value in unknown.items())
    return [
        f"config.json has keys that mlx_llava does not know and does not read: {named}. "
        "If one of them changes the maths, answers will be wrong."
    ]


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def refuse_value(where: str, key: str, found: object, expected: object) -> NoReturn:
    """Raises ValueError for a value, with what is supported instead."""
    raise ValueError(f"{where} has {key}={found!r}; mlx_llava supports {expected}.")


def names_of(cls: type) -> set[str]:
    """The names of a dataclass's fields."""
    return {field.name for field in fields(cls)}


def refuse_empty(config: object, where: str) -> None:
    """Raises ValueError for a size that is not positive."""
    for key, value in vars(config).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            refuse_value(where, key, value, "positive numbers")
