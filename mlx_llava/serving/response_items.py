"""What is said to OpenAI's Responses API, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AliasChoices, BeforeValidator, FailFast, Field, TypeAdapter

from mlx_llava.serving.forms import MAX_PARTS, Form, as_parts
from mlx_llava.serving.kept import Kept
from mlx_llava.serving.requests import Turn


class _Text(Form):
    """A text, or what an assistant said where it would not answer."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str = Field(validation_alias=AliasChoices("text", "refusal"))


class _Image(Form):
    type: Literal["input_image"]
    image_url: str


class _File(Form):
    """A file that is a picture."""

    type: Literal["input_file"]
    file_data: str


Part: TypeAlias = Annotated[_Text | _Image | _File, Field(discriminator="type")]
Parts: TypeAlias = Annotated[
    list[Part], FailFast(), BeforeValidator(as_parts), Field(max_length=MAX_PARTS)
]


class _Item(Form):
    """What was said in one turn, in texts and images."""

    def turn(self) -> Turn:
        parts = self.parts()
        texts = [part.text for part in parts if isinstance(part, _Text)]
        return self.speaker(), texts, len(parts) - len(texts)

    def images(self) -> list[str]:
        shown = [part for part in self.parts() if not isinstance(part, _Text)]
        return [part.image_url if isinstance(part, _Image) else part.file_data for part in shown]

    def speaker(self) -> str:
        return "user"

    def parts(self) -> Sequence[_Text | _Image | _File]:
        return ()


class _Message(_Item):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts

    def speaker(self) -> str:
        return "system" if self.role == "developer" else self.role

    def parts(self) -> Sequence[_Text | _Image | _File]:
        return self.content


class _Call(_Item):
    type: Literal["function_call"]
    arguments: str

    def speaker(self) -> str:
        return "assistant"

    def parts(self) -> Sequence[_Text]:
        return [_Text(type="text", text=self.arguments)]


class _CallOutput(_Item):
    type: Literal["function_call_output"]
    output: Parts

    def parts(self) -> Sequence[_Text | _Image | _File]:
        return self.output


class _Reasoning(_Item):
    """Thoughts of other models, which templates leave out."""

    type: Literal["reasoning"]

    def speaker(self) -> str:
        return "assistant"


class Reference(_Item):
    """An item that is kept."""

    type: Literal["item_reference"]
    id: str


Item: TypeAlias = Annotated[
    _Message | _Call | _CallOutput | _Reasoning | Reference, Field(discriminator="type")
]
_ITEM: TypeAdapter[Item] = TypeAdapter(Item)


def resolved(items: Sequence[Item], kept: Kept | None) -> list[Item]:
    """Items, with those that are kept in the place of their references.

    Raises:
        ApiError: There is none of a name.
    """
    return [
        _ITEM.validate_python((kept or Kept()).item(item.id))
        if isinstance(item, Reference)
        else item
        for item in items
    ]


def as_items(said: Any) -> Any:
    """Takes a text for what a user says, and what has no type for a message or a reference."""
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not isinstance(said, list):
        return said
    return [{"type": _kind(item), **item} if isinstance(item, dict) else item for item in said]


def _kind(item: Mapping[str, Any]) -> str:
    return "item_reference" if item.keys() == {"id"} else "message"
