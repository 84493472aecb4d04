"""Checks on the content of config files: what would change the maths is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from fnmatch import translate
from functools import cache
from typing import Any, NoReturn, TypeVar

from mlx_llava.model.known_keys import HARMLESS, NEUTRAL, OFF

Config = TypeVar("Config")
_KINDS: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str}


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
        changes: what changes the maths where it is not read, as known_keys.py names it.
        allowed: of keys that it reads, all values that are supported.
    """

    where: str
    keys: AbstractSet[str]
    changes: Mapping[str, str]
    allowed: Mapping[str, Sequence[object]] = field(default_factory=dict)

    def check(self, data: Mapping[str, Any]) -> None:
        """Raises ValueError for values that are not supported, and keys that change the maths."""
        for key, allowed in self.allowed.items():
            if data.get(key) is not None and data[key] not in allowed:
                *others, last = map(repr, allowed)
                self.refuse(key, data[key], f"{', '.join(others)} and {last}" if others else last)
        found = [
            f"{key}={value!r:.60} ({meaning})"
            for key, value in self._unread(data).items()
            for meaning, names in self.changes.items()
            if _pattern(names).match(key) and not _is_one_of(value, NEUTRAL.get(meaning, OFF))
        ]
        if found:
            raise ValueError(
                f"{self.where} has what changes the maths and mlx_llava does not support: "
                f"{', '.join(found)}."
            )

    def read(self, config: type[Config], data: Mapping[str, Any]) -> Config:
        """Makes a config of keys that are of its fields' kinds; null stands for a default."""
        values = {}
        for part in fields(config):  # type: ignore[arg-type]
            if (value := data.get(part.name)) is None:
                continue
            kind = str(part.type).removesuffix(" | None")
            if kind in _KINDS and not isinstance(value, _KINDS[kind]):
                self.refuse(part.name, value, f"a {kind}")
            if kind in ("int", "float") and value <= 0 and value is not False:
                self.refuse(part.name, value, "positive numbers")
            values[part.name] = value
        return config(**values)

    def unknown(self, data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """The keys that are neither read, nor known, nor off (null, false, empty)."""
        known = _pattern(" ".join(self.changes.values()))
        return {
            prefix + key: value
            for key, value in self._unread(data).items()
            if not known.match(key) and not (value is None or value is False or value in ([], {}))
        }

    def refuse(self, key: str, found: object, expected: object) -> NoReturn:
        """Raises ValueError for a value, with what is supported instead."""
        refuse_value(self.where, key, found, expected)

    def _unread(self, data: Mapping[str, Any]) -> dict[str, Any]:
        read, harmless = {*self.keys, *self.allowed}, _pattern(HARMLESS)
        return {k: value for k, value in data.items() if k not in read and not harmless.match(k)}


def names_of(config: type) -> set[str]:
    """The names of a dataclass's fields."""
    return {part.name for part in fields(config)}


def unknown_warning(unknown: Mapping[str, Any]) -> list[str]:
    """The one warning about keys that are not known, if there are any."""
    if not unknown:
        return []
    named = ", ".join(f"{key}={value!r:.60}" for key, value in unknown.items())
    return [
        f"config.json has keys that mlx_llava does not know and does not read: {named}. "
        "If one of them changes the maths, answers will be wrong."
    ]


def refuse_value(where: str, key: str, found: object, expected: object) -> NoReturn:
    """Raises ValueError for a value, with what is supported instead."""
    raise ValueError(f"{where} has {key}={found!r}; mlx_llava supports {expected}.")
