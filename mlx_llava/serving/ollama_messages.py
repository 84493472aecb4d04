"""The messages of Ollama's chats: who says what, and what is shown."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, FailFast, Field, model_validator

from mlx_llava.inputs.image import is_data_url
from mlx_llava.serving.forms import MAX_PARTS, Form
from mlx_llava.serving.replies import as_json
from mlx_llava.serving.requests import Turn

#: Where in a text the next picture is, for models that read pictures between words.
MARK = "[img]"


def _as_url(image: str) -> str:
    """Base64, and nothing else: neither a path nor a place elsewhere."""
    return image if is_data_url(image) else f"data:;base64,{image}"


Images = Annotated[list[Annotated[str, AfterValidator(_as_url)]], FailFast()]


class _Function(Form):
    arguments: dict[str, Any] = Field(default_factory=dict)


class _ToolCall(Form):
    """What an assistant had to call; its arguments are what it said."""

    function: _Function


class ChatMessage(Form):
    """A message; what a tool gives is the user's."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: Images = Field(default_factory=list)
    tool_calls: list[_ToolCall] = Field(default_factory=list, max_length=MAX_PARTS)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, message: Any) -> Any:
        """What is null is left out."""
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if value is not None}

    def turn(self) -> Turn:
        """Its role, texts and number of images, which come before the texts, marked or not."""
        text = self.content.replace(MARK, "", len(self.images))
        calls = [as_json(call.function.arguments) for call in self.tool_calls]
        role = "user" if self.role == "tool" else self.role
        return role, [*([text] if text or not calls else ()), *calls], len(self.images)
