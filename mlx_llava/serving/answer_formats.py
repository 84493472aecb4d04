"""What an answer is to look like: OpenAI's `response_format` -> a JSON schema, or none."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from mlx_llava.generation.json_schema import ANY_OBJECT
from mlx_llava.serving.messages import Lenient

MAX_SCHEMA_LENGTH = 100_000


def _short(schema: Any) -> Any:
    if (length := len(str(schema))) > MAX_SCHEMA_LENGTH:
        raise ValueError(f"it has {length:,} characters of {MAX_SCHEMA_LENGTH:,}")
    return schema


Schema: TypeAlias = Annotated[dict[str, Any], BeforeValidator(_short)]


class TextFormat(Lenient):
    """Any text."""

    type: Literal["text"]

    def schema_of_answers(self) -> dict[str, Any] | None:
        """What an answer must follow, if anything."""
        return None


class JsonFormat(Lenient):
    """Any JSON object, or one of a schema, as llama.cpp's clients ask for it."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema")

    def schema_of_answers(self) -> dict[str, Any] | None:
        """See `TextFormat`."""
        return self.schema_ or ANY_OBJECT


class JsonSchema(Lenient):
    """A schema; answers always follow it to the letter."""

    schema_: Schema = Field(alias="schema")


class SchemaFormat(Lenient):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def schema_of_answers(self) -> dict[str, Any] | None:
        """See `TextFormat`."""
        return self.json_schema.schema_


AnswerFormat: TypeAlias = Annotated[
    TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")
]
