"""The messages that OpenAI's clients send -> the conversation that a template can write.

Taken is what real clients were seen to send, beside what OpenAI documents: fields of their own,
plain texts for parts and for pictures, answers without content, turns in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from mlx_llava.inputs.messages import Message

MAX_MESSAGES = 1000
MAX_PARTS = 1000
THOUGHTS = ("reasoning", "redacted_thinking", "think", "thinking")


class Lenient(BaseModel):
    """Anything of a request; fields that it does not know ask nothing of the answer."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class TextPart(Lenient):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Lenient):
    """Where a picture is. Whatever `detail` is asked for, the model sees all that it can."""

    url: str


class UrlPart(Lenient):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _as_object(cls, image_url: Any) -> Any:
        return {"url": image_url} if isinstance(image_url, str) else image_url


Part = Annotated[TextPart | UrlPart, Field(discriminator="type")]


def _is_thought(part: Any) -> bool:
    """What templates leave out of earlier answers, like the field `reasoning_content`."""
    return isinstance(part, dict) and part.get("type") in THOUGHTS


class ChatMessage(Lenient):
    """A message, its content always in parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], FailFast()] = Field(max_length=MAX_PARTS)

    @model_validator(mode="before")
    @classmethod
    def _may_say_nothing(cls, message: Any) -> Any:
        """An assistant's content is null where it did something else, or holds thoughts."""
        if not isinstance(message, dict) or message.get("role") != "assistant":
            return message
        content = message.get("content") or []
        if isinstance(content, list):
            content = [part for part in content if not _is_thought(part)]
        return {**message, "content": content}

    @field_validator("content", mode="before")
    @classmethod
    def _in_parts(cls, content: Any) -> Any:
        parts = [content] if isinstance(content, str) else content
        if not isinstance(parts, list):
            return parts
        return [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]

    @property
    def is_answer_to_come(self) -> bool:
        """Whether a client has left room for the answer, which has not begun."""
        return self.role == "assistant" and not any(self.texts() + self.pictures())

    def texts(self) -> list[str]:
        return [part.text for part in self.content if isinstance(part, TextPart)]

    def pictures(self) -> list[str]:
        """The URLs of its pictures in order."""
        return [part.image_url.url for part in self.content if isinstance(part, UrlPart)]


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages for `Processor`, in the order that every template has.

    The texts of all system and developer messages become one system turn at the beginning.
    Turns of one role that follow each other are joined, and before an assistant's greeting
    stands a user's turn that says nothing. Images are shown to the model by a user: those of
    other messages go to the user's turn that follows, or to the last.
    """
    system: list[str] | None = None
    turns: list[tuple[str, list[str]]] = []
    images: list[int] = []
    shown = 0
    for message in messages:
        texts, shown = message.texts(), shown + len(message.pictures())
        if message.role in ("system", "developer"):
            system = (system or []) + texts
            continue
        if not turns or turns[-1][0] != message.role:
            turns.append((message.role, []))
            images.append(0)
        turns[-1][1].extend(texts)
        if message.role == "user":
            images[-1], shown = images[-1] + shown, 0
    if turns and turns[-1][0] == "user":
        images[-1] += shown
    joined = [Message(role, "\n".join(t), n) for (role, t), n in zip(turns, images, strict=True)]
    if turns and turns[0][0] == "assistant":
        joined.insert(0, Message("user", ""))
    return joined if system is None else [Message("system", "\n".join(system)), *joined]
