"""The messages of OpenAI's chats: who says what, and what is shown."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AliasChoices,
    BeforeValidator,
    FailFast,
    Field,
    field_validator,
    model_validator,
)

from mlx_llava.serving.forms import MAX_PARTS, Form, as_parts
from mlx_llava.serving.requests import Turn, VideoUrl

#: What templates leave out of earlier answers, like the field `reasoning_content`.
THOUGHTS = ("reasoning", "redacted_thinking", "think", "thinking")


def _as_object(image_url: Any) -> Any:
    return {"url": image_url} if isinstance(image_url, str) else image_url


class _TextPart(Form):
    """A text, or what an assistant said where it would not answer."""

    type: Literal["text", "input_text", "refusal"]
    text: str = Field(validation_alias=AliasChoices("text", "refusal"))


class _ImageUrl(Form):
    """Where an image or a video is; whatever `detail` is asked for, all that can be is seen."""

    url: str


class _UrlPart(Form):
    """The second name is that of the Responses API."""

    type: Literal["image_url", "input_image"]
    image_url: Annotated[_ImageUrl, BeforeValidator(_as_object)]


class _File(Form):
    file_data: str


class _FilePart(Form):
    """A file that is a picture."""

    type: Literal["file"]
    file: _File


class _VideoPart(Form):
    """Not OpenAI's; as vLLM, SGLang and OpenRouter have it."""

    type: Literal["video_url"]
    video_url: Annotated[_ImageUrl, BeforeValidator(_as_object)]


Part: TypeAlias = Annotated[
    _TextPart | _UrlPart | _FilePart | _VideoPart, Field(discriminator="type")
]


class _Function(Form):
    arguments: str = ""


class _ToolCall(Form):
    """What an assistant had to call; its arguments are what it said."""

    function: _Function


class ChatMessage(Form):
    """A message, its content always in parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], FailFast()] = Field(max_length=MAX_PARTS)
    tool_calls: list[_ToolCall] | None = Field(None, max_length=MAX_PARTS)

    @model_validator(mode="before")
    @classmethod
    def _may_say_nothing(cls, message: Any) -> Any:
        """An assistant's content is null where it refused or did something else, or thoughts."""
        if not isinstance(message, dict) or message.get("role") != "assistant":
            return message
        content = as_parts(message.get("content") or [])
        if isinstance(content, list):
            refused = as_parts(message.get("refusal") or [])
            content = [
                p
                for p in [*content, *(refused if isinstance(refused, list) else ())]
                if not (isinstance(p, dict) and p.get("type") in THOUGHTS)
            ]
        return {**message, "content": content}

    @field_validator("content", mode="before")
    @classmethod
    def _in_parts(cls, content: Any) -> Any:
        return as_parts(content)

    def turn(self) -> Turn:
        """Its role, texts and number of images; what a tool gives is the user's."""
        role = {"developer": "system", "tool": "user"}.get(self.role, self.role)
        texts = [part.text for part in self.content if isinstance(part, _TextPart)]
        texts += [call.function.arguments for call in self.tool_calls or ()]
        return role, texts, len(self.images())

    def images(self) -> list[str]:
        """The URLs of its images and videos in order."""
        return [_address(part) for part in self.content if not isinstance(part, _TextPart)]


def _address(part: _UrlPart | _FilePart | _VideoPart) -> str:
    if isinstance(part, _VideoPart):
        return VideoUrl(part.video_url.url)
    return part.file.file_data if isinstance(part, _FilePart) else part.image_url.url
