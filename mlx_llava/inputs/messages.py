"""A question, or messages in OpenAI's shape -> turns, checked once -> what a template writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

from mlx_llava.inputs.tokenizer import IMAGE_TOKEN
from mlx_llava.json_files import field

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ImagePart:
    """An image within a turn; where it has no source, the next of those given beside."""

    source: Any = None


@dataclass(frozen=True)
class Turn:
    """One message that was checked.

    Attributes:
        role: who speaks; what roles there are, templates know.
        content: a text, in which a user's ``<image>`` marks places, or parts, whose texts are
            just text.
    """

    role: str
    content: str | Sequence[str | ImagePart]


Conversation: TypeAlias = "str | Sequence[Mapping[str, Any] | Turn]"


@dataclass(frozen=True)
class Message:
    """A turn as templates write it.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        text: what was said; ``<image>`` in it marks the place of a picture.
        images: how many pictures of this turn have no mark and go to the default place.
    """

    role: str
    text: str
    images: int = 0


def check_turns(messages: Sequence[Message]) -> None:
    """Raises ValueError unless user and assistant take turns and the user begins."""
    for message in messages:
        if message.role not in ROLES:
            raise ValueError(f"There is no role {message.role!r}; known: {', '.join(ROLES)}.")
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = [ROLES[1 + i % 2] for i in range(len(turns))]
    if turns != expected or not turns:
        raise ValueError(
            "A conversation must be user, assistant, user, ... after an optional system turn; "
            f"found {', '.join(roles) or 'nothing'}."
        )


def read_messages(
    conversation: Conversation, images: Sequence[Any], protect: Callable[..., str]
) -> tuple[list[Message], list[Any]]:
    """Reads a question or a conversation, and puts every picture in its place.

    Content in parts has its pictures in parts: ``{"type": "image_url", "image_url": {"url":
    ...}}``, ``{"type": "image", "image": ...}``, or ``{"type": "image"}`` for the next of
    `images`. Pictures that are given beside the conversation and have no place in it belong to
    the first user turn.

    Args:
        conversation (str or list of dict): What is said.
        images (list): Pictures that are given beside it.
        protect (callable): `Tokenizer.protect`.

    Returns:
        The turns, and all pictures in reading order.
    """
    spoken = [Turn("user", conversation)] if isinstance(conversation, str) else conversation
    turns = [turn if isinstance(turn, Turn) else _turn(turn) for turn in spoken]
    beside = iter(images)
    messages: list[Message] = []
    used: list[Any] = []
    for turn in turns:
        role, content = turn.role, turn.content
        if isinstance(content, str):
            text = protect(content, keep={IMAGE_TOKEN} if role == "user" else ())
            messages.append(Message(role, text))
            used += islice(beside, text.count(IMAGE_TOKEN))
        else:
            text = "\n".join(protect(part) for part in content if isinstance(part, str))
            own = [_source(part, beside) for part in content if isinstance(part, ImagePart)]
            messages.append(Message(role, text, images=len(own)))
            used += own
    unplaced = list(beside)
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if unplaced and first is not None and IMAGE_TOKEN not in messages[first].text:
        before = sum(message.images for message in messages[:first])
        images_here = messages[first].images
        used[before:before] = unplaced
        messages[first] = replace(messages[first], images=images_here + len(unplaced))
    else:
        used += unplaced
    return messages, used


def _turn(message: Mapping[str, Any]) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise ValueError(f"A message must have role and content; found {message!r:.80}.")
    content = message["content"]
    if not isinstance(content, (str, Sequence)):
        raise ValueError(f"Content must be a text or a list of parts; found {content!r:.80}.")
    parts = content if isinstance(content, str) else [*map(_part, content)]
    return Turn(message["role"], parts)


def _part(part: Any) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        text: str = field(part, "text", str, "A part of a message")
        return text
    if kind == "image":
        keys = ("image", "url", "path")
        return ImagePart(next((part[key] for key in keys if part.get(key) is not None), None))
    if kind != "image_url":
        raise ValueError(f"A content part must be text, image or image_url; found {part!r:.80}.")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if url is None:
        raise ValueError("A part of a message is an image_url without a URL.")
    return ImagePart(url)


def _source(part: ImagePart, beside: Iterator[Any]) -> Any:
    source = next(beside, None) if part.source is None else part.source
    if source is None:
        raise ValueError("A message has more image parts than images were given.")
    return source
