"""A question, or messages in OpenAI's shape -> messages, checked once, and their images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

from mlx_llava.inputs.image import ImageSource
from mlx_llava.inputs.tokenizer import IMAGE_TOKEN
from mlx_llava.json_files import field

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """A checked message, as templates write it."""

    role: str  # one of ROLES
    text: str  # for a template, <image> in it marks the position of an image
    images: int = 0  # how many have no mark, and go to the default position


Conversation: TypeAlias = "str | Sequence[Mapping[str, Any] | Message]"


def check_turns(messages: Sequence[Message]) -> None:
    """Raises ValueError unless user and assistant take turns and the user begins."""
    roles = [message.role for message in messages]
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"There is no role {role!r}; known: {', '.join(ROLES)}.")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if {*turns[::2]} != {"user"} or not {*turns[1::2]} <= {"assistant"}:
        raise ValueError(
            "A conversation must be user, assistant, user, ... after an optional system turn; "
            f"found {', '.join(roles) or 'nothing'}."
        )


def read_messages(
    conversation: Conversation, images: Sequence[ImageSource], protect: Callable[..., str]
) -> tuple[list[Message], list[ImageSource]]:
    """Reads a question or a conversation, and puts every image in its place.

    Content in parts has its images in parts: ``{"type": "image_url", "image_url": {"url": ...}}``,
    ``{"type": "image", "image": ...}``, or ``{"type": "image"}`` for the next of `images`. Those
    that nothing in the conversation takes belong to the first user turn.

    Args:
        conversation: What is said. In a text of the user's, ``<image>`` marks a position; in
            parts, and in a `Message`, it is just text.
        images: Those that are given beside it.
        protect: `Tokenizer.protect`.

    Returns:
        The messages, and all images in reading order.
    """
    is_question = isinstance(conversation, str)
    turns = [{"role": "user", "content": conversation}] if is_question else conversation
    beside = iter(images)
    messages: list[Message] = []
    used: list[ImageSource] = []
    for turn in turns:
        message, sources = _read(turn, beside, protect)
        messages.append(message)
        used += sources
    unplaced = list(beside)
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if unplaced and first is not None and IMAGE_TOKEN not in messages[first].text:
        before = sum(message.images for message in messages[:first])
        used[before:before] = unplaced
        messages[first] = replace(messages[first], images=messages[first].images + len(unplaced))
    else:
        used += unplaced
    return messages, used


def _read(
    turn: Any, beside: Iterator[ImageSource], protect: Callable[..., str]
) -> tuple[Message, list[ImageSource]]:
    """A message, and its images in order."""
    if isinstance(turn, Message):
        return replace(turn, text=protect(turn.text)), [*islice(beside, turn.images)]
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise ValueError(f"A message must have role and content; found {turn!r:.80}.")
    role, content = turn["role"], turn["content"]
    if isinstance(content, str):
        text = protect(content, keep={IMAGE_TOKEN} if role == "user" else ())
        return Message(role, text), [*islice(beside, text.count(IMAGE_TOKEN))]
    if not isinstance(content, Sequence):
        raise ValueError(f"Content must be a text or a list of parts; found {content!r:.80}.")
    texts: list[str] = []
    images: list[ImageSource] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(protect(field(part, "text", str, "A part of a message")))
            continue
        image = _part_image(kind, part)
        image = next(beside, None) if image is None else image
        if image is None:
            raise ValueError("A message has more image parts than images were given.")
        images.append(image)
    return Message(role, "\n".join(texts), len(images)), images


def _part_image(kind: object, part: Mapping[str, Any]) -> ImageSource | None:
    """The image of a part; None for the next of those beside the conversation."""
    if kind == "image":
        keys = ("image", "url", "path")
        return next((part[key] for key in keys if part.get(key) is not None), None)
    if kind != "image_url":
        raise ValueError(f"A content part must be text, image or image_url; found {part!r:.80}.")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if url is None:
        raise ValueError("A part of a message is an image_url without a URL.")
    return url
