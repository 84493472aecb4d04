"""Training files as people have them -> conversations to learn.

LLaVA's own JSON, ShareGPT's and OpenAI's messages: ``conversations`` of ``from`` and ``value``, or
``messages`` of ``role`` and ``content``. The rules are those of the original LLaVA and LLaVA-NeXT
(llava/train/train.py), which know neither system turns nor images and videos in one conversation.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from mlx_llava.files import is_file, is_folder
from mlx_llava.inputs.messages import Message
from mlx_llava.inputs.tokenizer import IMAGE_TOKEN, VIDEO_TOKEN
from mlx_llava.json_files import JsonLines, Place, field, read_records

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_SYSTEM_KEYS = ("system", "system_prompt")
_TURN_KEYS = ("conversations", "messages")
_KINDS = {"image": "an image", "video": "a video"}
_MARKS = {IMAGE_TOKEN: "image", VIDEO_TOKEN: "video"}
_READ = {"id", *_KINDS, *(f"{kind}s" for kind in _KINDS), *_SYSTEM_KEYS}
#: Why a sample is left out whose files are not there.
MISSING = tuple(f"{kind} is missing" for kind in _KINDS)
_UNSUPPORTED = ("audio", "audios")
_NOWHERE = Place("memory", "index", 0)


class Film(NamedTuple):
    """A video's file, or the folder of its frames."""

    path: Path


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        messages: its turns; images and videos stand first in theirs, and count as images.
        images: the files of both in reading order.
        place: where it stands in its file.
    """

    messages: tuple[Message, ...]
    images: tuple[Path | Film, ...]
    place: Place = _NOWHERE

    @property
    def length(self) -> int:
        """The number of characters, to group by."""
        return sum(len(message.text) for message in self.messages)


class UnusableError(ValueError):
    """A sample cannot be learned.

    Attributes:
        reason: why, in the same words for all samples of its kind.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail:.200}" if detail else reason)
        self.reason = reason


class LeftOut(NamedTuple):
    """A sample that is not learned."""

    place: Place
    error: UnusableError


class Skipped:
    """Adds a line to skipped.jsonl for each sample that is left out; only once in all of a run."""

    def __init__(self, path: Path) -> None:
        """Goes on with a list, if there is one.

        Raises:
            ValueError: It holds something else.
        """
        self._file = JsonLines(path, '{"file": ', errors="replace")
        self._listed = {_identity(place, record) for place, record in self._file.read()}
        self._file.mend()

    def __call__(self, left_out: LeftOut) -> None:
        """Lists a sample."""
        place = left_out.place
        record = {"file": place.file, place.unit: place.number, "why": str(left_out.error)}
        identity = _identity(place, record)
        if identity in self._listed:
            return
        self._listed.add(identity)
        self._file.add(record)


def _identity(place: Place, record: Any) -> str:
    file = field(record, "file", str, place)
    return f"{file}, {record.get('line')}, {record.get('index')}"


class TrainingFile(NamedTuple):
    """What a training file holds.

    Attributes:
        samples: what can be learned.
        left_out: what cannot.
        unread: keys that hold text or files and are not read, and in how many samples.
    """

    samples: list[Sample]
    left_out: list[LeftOut]
    unread: Counter[str]

    @property
    def problems(self) -> Counter[str]:
        """How many samples are left out for each reason."""
        return Counter(left_out.error.reason for left_out in self.left_out)


def read_samples(
    path: str | Path, image_folder: str | Path, protect: Callable[[str], str]
) -> TrainingFile:
    """Reads a training file: a list, or one object a line.

    As in the original, a conversation begins with its first human turn, and the images and
    videos of a turn are moved to its front. Those without any mark go to the first; ``<image>``
    marks a video where a sample has nothing else. A system turn or key takes the place of the
    template's system text, unless it is empty. A sample that cannot be used is left out.

    Args:
        path (str or Path): The file.
        image_folder (str or Path): What the paths of images and videos are relative to.
        protect (callable): `Tokenizer.protect`.

    Raises:
        ValueError: The file is no JSON, or nothing in it can be used.
    """
    reading = TrainingFile([], [], Counter())
    for place, entry in read_records(Path(path)):
        try:
            messages, images = _read_sample(entry, Path(image_folder))
        except UnusableError as error:
            reading.left_out.append(LeftOut(place, error))
            continue
        messages = [replace(message, text=protect(message.text)) for message in messages]
        reading.samples.append(Sample(tuple(messages), tuple(images), place))
        reading.unread.update(set(_unread(entry)))
    if not reading.samples:
        reasons = summary(reading.problems)
        first = "; first, {}: {}".format(*reading.left_out[0]) if reading.left_out else ""
        raise ValueError(
            f"{path} has no sample that can be used: {reasons or 'it is empty'}{first}."
        )
    return reading


def fingerprint(samples: Sequence[Sample]) -> str:
    """What tells samples from others, wherever they lie: their order, texts and files' names."""
    found = hashlib.sha256()
    for sample in samples:
        turns = [(one.role, one.text, one.images, one.learned) for one in sample.messages]
        files = [(one.path if isinstance(one, Film) else one).name for one in sample.images]
        found.update(repr((turns, files)).encode())
    return found.hexdigest()[:16]


def summary(counts: Mapping[str, int]) -> str:
    """Counts in words."""
    return ", ".join(f"{what} ({count})" for what, count in counts.items())


class _Mark(NamedTuple):
    """Where an image or a video stands in a turn; without a name, the next beside the turns."""

    kind: str
    name: str | None = None


def _read_sample(entry: Any, folder: Path) -> tuple[list[Message], list[Path | Film]]:
    if not isinstance(entry, Mapping):
        raise UnusableError("not an object")
    _refuse_unsupported(entry)
    names = {kind: _names(entry, kind) for kind in _KINDS}
    turns = [_read_turn(turn, bool(names["video"])) for turn in entry[_turns_key(entry)]]
    texts = [entry[key] for key in _SYSTEM_KEYS if entry.get(key)]
    if turns and turns[0][0].role == "system":
        texts.append(turns.pop(0)[0].text)
    while turns and turns[0][0].role == "assistant":
        del turns[0]
    messages = [message for message, _ in turns]
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UnusableError("turns do not alternate", ", ".join(roles))
    if not any(message.learned for message in messages if message.role == "assistant"):
        raise UnusableError("every answer has the weight 0")
    marks = [mark for _, inside in turns for mark in inside]
    if not marks:
        marks = [_Mark(kind) for kind in _KINDS for _ in names[kind]]
        messages[0] = replace(messages[0], images=len(marks))
    elif names["video"] and not names["image"]:  # the original has one mark for all
        marks = [mark if mark.name else _Mark("video") for mark in marks]
    named = {kind: iter(_named(kind, marks, names[kind])) for kind in _KINDS}
    shown = [_find(kind, next(named[kind]), folder) for kind, _ in marks]
    return [*_system(texts), *messages], shown


def _system(texts: Sequence[Any]) -> list[Message]:
    """The system turn, if there is text for one."""
    for text in texts:
        if not isinstance(text, str):
            raise UnusableError("the system text is no text", short(text))
    found = {text for text in texts if text.strip()}
    if len(found) > 1:
        raise UnusableError("more than one system text")
    return [Message("system", text) for text in found]


def _named(kind: str, marks: Sequence[_Mark], names: Sequence[str]) -> Sequence[str]:
    """The names of a sample's images: those in its turns, and for the others those beside it."""
    own = [mark.name for mark in marks if mark.kind == kind]
    inside = [name for name in own if name is not None]
    open_marks = len(own) - len(inside)
    if not open_marks and names in ([], inside):
        return inside
    if open_marks != len(names):
        detail = f"{open_marks} marks, {len(names)} {kind}s"
        raise UnusableError(f"marks and {kind}s differ in number", detail)
    beside = iter(names)
    return [next(beside) if name is None else name for name in own]


def _find(kind: str, name: str, folder: Path) -> Path | Film:
    if name.startswith(("data:", "http://", "https://")):
        raise UnusableError(f"{_KINDS[kind]} is a URL, expected a file", short(name))
    path = folder / name
    if not is_file(path) and not (kind == "video" and is_folder(path)):
        raise UnusableError(f"{kind} is missing", str(path))
    return path if kind == "image" else Film(path)


def _refuse_unsupported(entry: Mapping[str, Any]) -> None:
    for key in _UNSUPPORTED:
        if entry.get(key):
            raise UnusableError(f"{key} is not supported")


def _turns_key(entry: Mapping[str, Any]) -> str:
    for key in _TURN_KEYS:
        if isinstance(entry.get(key), list):
            return key
    raise UnusableError("no list of conversations or messages", ", ".join(entry))


def _read_turn(turn: Any, has_videos: bool) -> tuple[Message, list[_Mark]]:
    """A turn, and what it shows; ``<video>`` is text where its sample names no video."""
    if not isinstance(turn, Mapping):
        raise UnusableError("a turn is not an object")
    _refuse_unsupported(turn)
    speaker = turn.get(_key(turn, "from", "role"))
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise UnusableError("a turn has an unknown role", short(speaker))
    text, marks = _read_content(turn.get(_key(turn, "value", "content")))
    if role != "user":
        if marks:
            raise UnusableError("a picture in a turn that is not the user's")
        return Message(role, text, learned=role != "assistant" or _is_learned(turn)), []
    pattern = "|".join(_MARKS) if has_videos else IMAGE_TOKEN
    if found := re.findall(pattern, text):
        marks += [_Mark(_MARKS[mark]) for mark in found]
        text = re.sub(pattern, "", text).strip()
    return Message(role, text, images=len(marks)), marks


def _is_learned(turn: Mapping[str, Any]) -> bool:
    """Whether an answer has OpenAI's weight 1, as most have without saying so."""
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise UnusableError("the weight of an answer is neither 0 nor 1", short(weight))
    return weight != 0


def _key(turn: Mapping[str, Any], *names: str) -> str:
    return next((name for name in names if name in turn), names[0])


def _read_content(content: Any) -> tuple[str, list[_Mark]]:
    """The text of a turn, and what stands beside it as parts."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise UnusableError("a turn has no text", short(content))
    texts: list[str] = []
    marks: list[_Mark] = []
    for part in content:
        named = part.get("type")
        kind = named.removesuffix("_url") if isinstance(named, str) else ""
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _KINDS:
            marks.append(_Mark(kind, _part_name(part, kind)))
        elif kind in _UNSUPPORTED:
            raise UnusableError(f"{named} is not supported")
        else:
            raise UnusableError("a part is neither text nor image", short(part))
    return "\n".join(texts), marks


def _part_name(part: Mapping[str, Any], kind: str) -> str | None:
    keys = (kind, f"{kind}_url", "path", "url")
    source = next((part[key] for key in keys if part.get(key)), None)
    source = source.get("url") if isinstance(source, Mapping) else source
    if source is not None and not isinstance(source, str):
        raise UnusableError(f"{_KINDS[kind]} is no file's name", short(source))
    return source


def _names(entry: Mapping[str, Any], kind: str) -> list[str]:
    """The files that a sample names beside its turns."""
    given = [entry[key] for key in (kind, f"{kind}s") if entry.get(key)]
    lists = [[names] if isinstance(names, str) else names for names in given]
    for names in lists:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UnusableError(f"{_KINDS[kind]} is no file's name", short(names))
    if len(lists) == 2 and lists[0] != lists[1]:
        raise UnusableError(f"{kind} and {kind}s differ")
    return lists[0] if lists else []


def _unread(entry: Mapping[str, Any]) -> Iterator[str]:
    """The keys that hold text or files and are not read."""
    turns = _turns_key(entry)
    yield from _filled(entry, {*_READ, turns})
    for turn in entry[turns]:
        read = {_key(turn, "from", "role"), _key(turn, "value", "content")}
        yield from (f"{turns}.{key}" for key in _filled(turn, read))


def _filled(data: Mapping[str, Any], read: set[str]) -> list[str]:
    kinds = (str, list, dict)
    return [k for k, value in data.items() if k not in read and value and isinstance(value, kinds)]
