"""A question, or messages in OpenAI's shape -> messages, checked once, and what they show."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mlx_llava.inputs.image import ImageSource
from mlx_llava.inputs.tokenizer import IMAGE_TOKEN, VIDEO_TOKEN
from mlx_llava.inputs.video import Video, VideoSource, load_video
from mlx_llava.json_files import field

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """A checked message, as templates write it."""

    role: str  # one of ROLES
    text: str  # for a template, <image> in it marks the position of an image
    images: int = 0  # how many have no mark, and go to the default position
    videos: int = 0  # the same; until a message is read, they count as images
    learned: bool = True  # in training, if it is the assistant's


Conversation: TypeAlias = "str | Sequence[Mapping[str, Any] | Message]"
#: What a message shows.
Shown: TypeAlias = "ImageSource | Video"

_MARKS = re.compile(f"{re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)}")


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


@dataclass(frozen=True)
class Reading:
    """How conversations are read for a model.

    Attributes:
        protect: `Tokenizer.protect`.
        load_video: takes frames of a video.
        video_mark: what stands for a video in a prompt; None where each of its frames is an image.
        marks: what marks a position in a text.
    """

    protect: Callable[..., str]
    load_video: Callable[[VideoSource], Video] = load_video
    video_mark: str | None = None
    marks: tuple[str, ...] = (IMAGE_TOKEN,)

    def marks_of(self, source: Shown) -> list[str]:
        """Those that stand for an image or a video in a prompt."""
        if not isinstance(source, Video):
            return [IMAGE_TOKEN]
        return [self.video_mark] if self.video_mark else [IMAGE_TOKEN] * len(source.frames)

    def fill(self, text: str, beside: list[Shown]) -> tuple[str, list[Shown]]:
        """A text whose marks are those of what they stand for, which is taken from `beside`."""
        shown: list[Shown] = []

        def mark(match: re.Match[str]) -> str:
            if match[0] not in self.marks or not (source := _take(beside, match[0])):
                return match[0]
            shown.extend(source)
            return "".join(self.marks_of(*source))

        return _MARKS.sub(mark, text), shown

    def counted(self, message: Message, shown: Sequence[Shown]) -> Message:
        """A message whose images and videos have no marks, with how many these need."""
        marks = [mark for source in shown for mark in self.marks_of(source)]
        images, videos = marks.count(IMAGE_TOKEN), marks.count(VIDEO_TOKEN)
        return replace(message, images=images, videos=videos)


def read_messages(
    conversation: Conversation, images: Sequence[Shown], reading: Reading
) -> tuple[list[Message], list[Shown]]:
    """Reads a question or a conversation, and puts every image and video in its place.

    Content in parts has its images in parts: ``{"type": "image_url", "image_url": {"url": ...}}``,
    ``{"type": "image", "image": ...}``, or ``{"type": "image"}`` for the next of `images`; so it
    is with videos. Those that nothing in the conversation takes belong to the first user turn.

    Args:
        conversation: What is said. In a text of the user's, ``<image>`` marks a position, and
            ``<video>`` where there are videos; in parts, and in a `Message`, they are just text.
        images: Those that are given beside it, and videos.
        reading: How it is read.

    Returns:
        The messages, and all images and videos in the order in which they are shown.
    """
    is_question = isinstance(conversation, str)
    turns = [{"role": "user", "content": conversation}] if is_question else conversation
    beside = list(images)
    if reading.video_mark == VIDEO_TOKEN or any(isinstance(source, Video) for source in beside):
        reading = replace(reading, marks=(IMAGE_TOKEN, VIDEO_TOKEN))
    read = [_read(turn, beside, reading) for turn in turns]
    messages, shown = [message for message, _ in read], [sources for _, sources in read]
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if beside and first is not None and not any(m in messages[first].text for m in reading.marks):
        shown[first][:0] = beside
        messages[first] = reading.counted(messages[first], shown[first])
        beside = []
    return messages, [source for sources in [*shown, beside] for source in sources]


def rows_of(prompt: Any, *shown: Any) -> list[tuple[Any, ...]]:
    """Each prompt with its own images and videos: one, or the rows of a batch."""
    if isinstance(prompt, str) or all(isinstance(turn, (Mapping, Message)) for turn in prompt):
        return [(prompt, *map(as_list, shown))]
    columns = [[None] * len(prompt) if one is None else as_list(one) for one in shown]
    for column in columns:
        if len(column) != len(prompt):
            raise ValueError(f"There are {len(prompt)} prompts but images for {len(column)}.")
    return [(row, *map(as_list, rest)) for row, *rest in zip(prompt, *columns, strict=True)]


def as_list(images: Any) -> list[Any]:
    """One image, several or none, as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _take(beside: list[Shown], mark: str | None = None) -> list[Shown]:
    """The next of what is given beside a conversation, or the next for a mark, if there is one."""
    fitting = (
        i
        for i, source in enumerate(beside)
        if mark is None or isinstance(source, Video) == (mark == VIDEO_TOKEN)
    )
    return [beside.pop(i) for i in [*fitting][:1]]


def _read(turn: Any, beside: list[Shown], reading: Reading) -> tuple[Message, list[Shown]]:
    """A message, and its images and videos in order."""
    if isinstance(turn, Message):
        shown = [source for _ in range(turn.images) for source in _take(beside)]
        missing = [""] * (turn.images - len(shown))  # images all the same, as marks would be
        message = replace(turn, text=reading.protect(turn.text))
        return reading.counted(message, [*shown, *missing]), shown
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise ValueError(f"A message must have role and content; found {turn!r:.80}.")
    role, content = turn["role"], turn["content"]
    if isinstance(content, str):
        text = reading.protect(content, keep=reading.marks if role == "user" else ())
        text, shown = reading.fill(text, beside)
        return Message(role, text), shown
    if not isinstance(content, Sequence):
        raise ValueError(f"Content must be a text or a list of parts; found {content!r:.80}.")
    texts: list[str] = []
    shown = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(reading.protect(field(part, "text", str, "A part of a message")))
        else:
            shown.append(_part(kind, part, beside, reading))
    return reading.counted(Message(role, "\n".join(texts)), shown), shown


def _part(kind: object, part: Mapping[str, Any], beside: list[Shown], reading: Reading) -> Shown:
    """What a part shows: its own, or the next of those beside the conversation."""
    what = next((w for w in ("image", "video") if kind in (w, f"{w}_url")), None)
    if what is None:
        raise ValueError(
            "A content part must be text, image, image_url, video or video_url; found "
            f"{part!r:.80}."
        )
    source = _source(what, part)
    if source is None:
        if not (following := _take(beside, f"<{what}>")):
            raise ValueError(f"A message has more {what} parts than {what}s were given.")
        return following[0]
    return source if what == "image" else reading.load_video(source)


def _source(what: str, part: Mapping[str, Any]) -> Any:
    """The source in a part; None for the next of those beside the conversation."""
    if part["type"] == what:
        return next((part[k] for k in (what, "url", "path") if part.get(k) is not None), None)
    url = part.get(f"{what}_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if url is None:
        raise ValueError(f"A part of a message is an {what}_url without a URL.")
    return url
