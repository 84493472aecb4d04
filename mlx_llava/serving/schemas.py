"""The schemas that answers have to follow, as clients send them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator

from mlx_llava.generation.json_schema import LENIENT

MAX_SCHEMA_LENGTH = 100_000
#: What is no schema, and what is one only together with others.
_AS_THEY_ARE = frozenset("const default enum examples required allOf".split())
#: What lets an object have other properties.
_OPENING = frozenset(
    "additionalProperties patternProperties unevaluatedProperties allOf anyOf oneOf then else "
    "dependentSchemas $ref".split()
)


def short_schema(schema: Any) -> Any:
    """A schema, unless it is longer than any answer needs.

    Raises:
        ValueError: It is.
    """
    if (length := len(str(schema))) > MAX_SCHEMA_LENGTH:
        raise ValueError(f"it has {length:,} characters of {MAX_SCHEMA_LENGTH:,}")
    return schema


def closed(schema: Any) -> Any:
    """A schema whose objects have only the properties that it names, where it does not say.

    As Ollama, llama.cpp and vLLM take those of clients, who seldom say.
    """
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    parts = {k: v if k in _AS_THEY_ARE else closed(v) for k, v in schema.items()}
    if "properties" in schema and not _OPENING & schema.keys():
        parts["additionalProperties"] = False
    return parts


def wanted(schema: Mapping[str, Any], strict: bool | None = False) -> dict[str, Any]:
    """A schema as strict as it is meant: of a hint, what cannot be enforced is left out."""
    return {**schema} if strict else {**schema, **LENIENT}


def _read(schema: Any) -> Any:
    return closed(short_schema(schema))


Schema: TypeAlias = Annotated[dict[str, Any], BeforeValidator(_read)]
