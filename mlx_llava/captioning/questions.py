"""What is asked about each picture, and into which columns the answers go."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_llava.json_files import parse

PROMPT = "Describe the picture."
#: The column of a prompt that has no name.
TEXT = "text"
_NAMED = re.compile(r"([A-Za-z_][\w-]*)=(.*)", re.DOTALL)
#: Columns that files of captions and of errors have anyway.
_TAKEN = {"image", "error"}


@dataclass(frozen=True)
class Questions:
    """The prompts, and the columns that come of them.

    Attributes:
        prompts: by name.
        fields: what answers are objects of; none where they are texts.
        prefix: before each text.
        suffix: after each text.
    """

    prompts: Mapping[str, str]
    fields: Sequence[str] = ()
    prefix: str = ""
    suffix: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """What an answered picture has, in order."""
        return tuple(
            column
            for name in self.prompts
            for column in ([self._column(name, field) for field in self.fields] or [name])
        )

    def _column(self, name: str, field: str) -> str:
        return field if len(self.prompts) == 1 else f"{name}.{field}"

    def values(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The answers to all prompts, by column.

        Args:
            answers (list): What `answer_prompts` yields for each prompt, in their order.

        Raises:
            ValueError: One is an error, or no whole JSON where that is asked for.
        """
        values: dict[str, Any] = {}
        for name, answer in zip(self.prompts, answers, strict=True):
            if "error" in answer:
                raise ValueError(answer["error"])
            text = answer["text"].strip()
            if not self.fields:
                values[name] = self.prefix + text + self.suffix
                continue
            data = _parse(text)
            values |= {self._column(name, field): data.get(field) for field in self.fields}
        return values


def read_questions(
    prompts: Sequence[str], schema: Mapping[str, Any] | None, prefix: str = "", suffix: str = ""
) -> Questions:
    """What to ask, of prompts that may be ``NAME=PROMPT``.

    Args:
        prompts (list): The prompts; none for the usual one.
        schema (dict, optional): What answers are of; each of its properties is a column.
        prefix (str): Goes before each text.
        suffix (str): Goes after each text.

    Raises:
        ValueError: Two columns have one name, or a text is put before or after JSON.
    """
    named: dict[str, str] = {}
    for prompt in prompts or [PROMPT]:
        match = _NAMED.match(prompt)
        name = TEXT if len(named) == 0 else f"{TEXT}_{len(named) + 1}"
        name, prompt = match.groups() if match else (name, prompt)
        if name in named:
            raise ValueError(f"Two prompts are named {name}; name one of them otherwise.")
        named[name] = prompt
    questions = Questions(named, tuple((schema or {}).get("properties", ())), prefix, suffix)
    if taken := _TAKEN.intersection(questions.columns):
        raise ValueError(f"A column is named {taken.pop()}, as one of the files' own; rename it.")
    if schema is not None and (prefix or suffix):
        raise ValueError("--prefix and --suffix go around texts; --json-schema has none.")
    return questions


def with_columns_alone(schema: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A schema of objects that have no other keys than its own, unless it says otherwise.

    To JSON schema, properties are those of an object if it is one; here they are columns.
    """
    if schema is None or not schema.get("properties"):
        return None if schema is None else dict(schema)
    return {"type": "object", "additionalProperties": False, **schema}


def as_text(value: Any) -> str:
    """A value as text: of a list, what is in it, with commas between."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def whole_text(values: Mapping[str, Any]) -> str:
    """All columns of a picture as one text, a line for each that is not empty."""
    return "\n".join(text for text in map(as_text, values.values()) if text)


def _parse(text: str) -> dict[str, Any]:
    try:
        data = parse(text, "The answer")
    except ValueError as error:
        raise ValueError(
            f"The answer is no whole JSON; raise --max-tokens: {text!r:.60}"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"The answer is no object: {text!r:.60}")
    return data
