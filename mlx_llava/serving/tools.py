"""Tools that have to be called: what LLaVA was never trained for becomes JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mlx_llava.generation.json_schema import ANY_OBJECT
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.replies import Piece
from mlx_llava.serving.requests import Turn
from mlx_llava.serving.schemas import closed, short_schema, wanted

#: Characters of descriptions that a question leaves room for; longer ones are not shown.
MAX_DESCRIPTIONS = 2000


@dataclass(frozen=True)
class ForcedTools:
    """Tools of which an answer is one call: the arguments of the only one, or a choice.

    Attributes:
        schemas: of the arguments, by the names of the tools.
        descriptions: what they are for, of those that say so.
        is_strict: whether nothing that their schemas say may be left out.
    """

    schemas: Mapping[str, Mapping[str, Any]]
    descriptions: Mapping[str, str]
    is_strict: bool = False

    def text(self) -> str:
        """What is said of them, or nothing, if it leaves no room for a question."""
        lines = [*filter(None, map(self._line, self.schemas))]
        text = "\n".join(["Answer with the arguments of", *lines])
        return text if lines and len(text) <= MAX_DESCRIPTIONS else ""

    def _line(self, name: str) -> str:
        properties = self.schemas[name].get("properties")
        described = {
            key: value["description"]
            for key, value in (properties if isinstance(properties, Mapping) else {}).items()
            if isinstance(value, Mapping) and isinstance(value.get("description"), str)
        }
        said = [self.descriptions.get(name, ""), *(f"{k}: {v}" for k, v in described.items())]
        return f"{name}: {'; '.join(filter(None, said))}" if any(said) else ""

    def schema(self) -> dict[str, Any]:
        """What the answer has to follow."""
        if len(self.schemas) == 1:
            (schema,) = self.schemas.values()
            return wanted({"type": "object", **schema}, self.is_strict)
        calls = enumerate(self.schemas.items())
        choice = {"anyOf": [_call(index, name, schema) for index, (name, schema) in calls]}
        return wanted(choice, self.is_strict)

    def read(self, text: str, finish_reason: str | None) -> tuple[str | None, str]:
        """The name of the tool and its arguments so far, as JSON; no name where it is not out."""
        if len(self.schemas) == 1:
            return next(iter(self.schemas)), text
        for name in self.schemas:
            opening = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
            if text.startswith(opening):  # and the last bracket is none of the arguments'
                end = None if finish_reason == "length" else -1
                return name, text[len(opening) : end]
        return None, ""


def described(turns: Sequence[Turn], tools: ForcedTools | None) -> list[Turn]:
    """Turns, with what is said of tools after the question."""
    text = tools.text() if tools else ""
    is_asked = bool(text and turns) and turns[-1][0] == "user"
    return [*turns, ("user", [text], 0)] if is_asked else [*turns]


def _call(index: int, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one call among others, its references where they now lead."""
    arguments = _moved({"type": "object", **schema}, f"#/anyOf/{index}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }


class Growing:
    """What an answer says as it grows: a text, or the arguments of a tool.

    Attributes:
        text: so far.
        name: of the tool, once it is out.
    """

    def __init__(self, tools: ForcedTools | None) -> None:
        self._tools, self._whole = tools, ""
        self.text, self.name = "", cast("str | None", None)

    def add(self, piece: Piece) -> str:
        """The text that a piece adds."""
        self._whole += piece.text
        before = len(self.text)
        if self._tools is not None:
            self.name, self.text = self._tools.read(self._whole, piece.finish_reason)
        if self._tools is None or (piece.finish_reason and self.name is None):
            self.text = self._whole
        return self.text[before:]


def forced_tools(tools: Any, choice: Any) -> ForcedTools | None:
    """What has to be called, by the `tools` and `tool_choice` of OpenAI's APIs and Anthropic's.

    Raises:
        ApiError: There is no such tool, or the choice is none that is known.
    """
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    if kind in (None, "", "auto", "none"):
        return None
    functions = [*filter(None, map(_function, tools if isinstance(tools, list) else ()))]
    schemas = {name: schema for name, schema, *_ in functions}
    if kind in ("function", "tool"):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        schemas = {name: schemas[name]} if isinstance(name, str) and name in schemas else {}
    elif kind not in ("any", "required"):
        message = "tool_choice is not supported here, but for auto, none, required, and a function."
        raise ApiError(400, message, "unsupported_parameter", param="tool_choice")
    if not schemas:
        raise ApiError(400, "tool_choice names no function of tools.", param="tool_choice")
    try:
        short_schema(schemas)
    except ValueError as error:
        raise ApiError(400, f"tools: {error}", param="tools") from error
    descriptions = {name: description for name, _, description, _ in functions}
    is_strict = all(strict for name, *_, strict in functions if name in schemas)
    return ForcedTools(schemas, descriptions, is_strict)


def _function(tool: Any) -> tuple[str, Mapping[str, Any], str, bool] | None:
    """Its name, schema and description, and whether it is strict, if a tool is a function."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    schema = function.get("parameters", function.get("input_schema"))
    said = function.get("description")
    return (
        function["name"],
        closed(schema) if isinstance(schema, Mapping) else ANY_OBJECT,
        said if isinstance(said, str) else "",
        function.get("strict") is True,
    )
