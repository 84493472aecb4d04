"""Which images and films a typed line names: as terminals quote paths, and in a sentence."""

from __future__ import annotations

import io
import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from mlx_llava.files import is_file
from mlx_llava.inputs.image_paths import image_endings
from mlx_llava.inputs.video import ENDINGS, is_film

#: Longer lines are text.
MAX_LENGTH = 32768
#: The longest name that is looked for, and how many quotation marks it may hold.
_LONGEST, _MARKS = 1024, 8
_QUOTES = dict(zip("'\"`\u2018\u201c\u00ab\u201e", "'\"`\u2019\u201d\u00bb\u201c", strict=True))
_BEFORE = " \t([{<,;:=" + "".join(_QUOTES)
_AFTER = "?!.,;:)]}>" + "".join(_QUOTES.values())
_URLS = ("http://", "https://", "data:")


class Mention(NamedTuple):
    """A file that a line names from `start` to `end`."""

    start: int
    end: int
    path: str


def split_line(line: str) -> tuple[list[str], str]:
    """The images and films that a line names, each once, and the question without them.

    That may be "". A path before or after the question is left out of it; one within a sentence
    becomes "this picture" or "this video", or "picture 1" and so on where there are several.
    """
    found = list(_mentions(line, _is_shown))
    paths = list(dict.fromkeys(mention.path for mention in found))
    if not found:
        return [], line.strip()
    ends = [0, *(mention.end for mention in found)]
    starts = [*(mention.start for mention in found), len(line)]
    first, *between, last = [line[a:b] for a, b in zip(ends, starts, strict=True)]
    if not any(_has_words(part) for part in between):
        if not _has_words(first):
            return paths, last.strip(" \t\r,;:-") if _has_words(last) else ""
        if not _has_words(last) and _is_mark(first.rstrip()[-1], "?!.:"):
            return paths, first.strip()
    text = first
    for mention, following in zip(found, [*between, last], strict=True):
        number = paths.index(mention.path) + 1
        kind = "video" if is_film(mention.path) else "picture"
        text += f"{kind} {number}" if paths[1:] else f"this {kind}"
        text += following
    return paths, text.strip()


def pasted_files(line: str) -> list[str]:
    """The files that a line consists of; [] if there is anything else in it."""
    names = image_names(line)
    return names if all(map(_is_path, names)) else []


def file_name(argument: str) -> str:
    """The one file that an argument names, quoted as in a shell or not at all."""
    with suppress(ValueError):  # several words, or a quote that stays open
        (argument,) = shlex.split(argument)
    return _to_path(argument)


def image_names(arguments: str) -> list[str]:
    """The files, URLs and other names of an argument list, also those of files that are missing."""
    whole = _to_path(arguments.strip())
    if _is_file(whole):
        return [whole]
    names, end = list[str](), 0
    for mention in [*_mentions(arguments, _is_file), Mention(len(arguments), 0, "")]:
        names += _other_names(arguments[end : mention.start])
        names += [mention.path] if mention.path else []
        end = mention.end
    return names


def missing_paths(line: str) -> list[str]:
    """What looks like the path of an image or a film in a line from which files are taken out."""
    words = (word.lstrip(_BEFORE).rstrip(_AFTER) for word in line[:MAX_LENGTH].split())
    return [word for word in words if _has_ending(word) and not word.startswith(_URLS)]


def _other_names(text: str) -> Iterator[str]:
    """Words that are names by themselves, and what is between them as one name."""
    for alone, group in groupby(text.split(), lambda w: w == "clipboard" or w.startswith(_URLS)):
        words = list(group)
        yield from words if alone else [_to_path(" ".join(words).strip("'\","))]


def _mentions(line: str, accepts: Callable[[str], bool]) -> Iterator[Mention]:
    if len(line) > MAX_LENGTH:
        return
    endings = "|".join(re.escape(ending) for ending in sorted(image_endings() | ENDINGS))
    pattern = rf"(?i:{endings})(?![A-Za-z0-9_/\\-]|\.[A-Za-z0-9])"
    ends = [match.end() for match in re.finditer(pattern, line)]
    start = 0
    while start < len(line):
        found = None
        if _may_begin(line, start):
            near = [end for end in reversed(ends) if start < end <= start + _LONGEST]
            names = (Mention(start, end, _to_path(n)) for n, end in _names_at(line, start, near))
            found = next((mention for mention in names if accepts(mention.path)), None)
        if found:
            yield found
        start = found.end if found else start + 1


def _may_begin(line: str, start: int) -> bool:
    """Whether a path may begin here, which is not after a space that is part of one."""
    if not start:
        return not line[0].isspace()
    is_escaped = line[start - 2 : start - 1] == "\\"
    is_after_mark = _is_mark(line[start - 1], _BEFORE)
    return is_after_mark and not is_escaped and not line[start].isspace()


def _names_at(line: str, start: int, ends: list[int]) -> Iterator[tuple[str, int]]:
    """What may be the name of a file here, and where it ends, the likeliest first."""
    closing = _QUOTES.get(line[start])
    if closing:
        for match in islice(re.finditer(re.escape(closing), line[start + 1 :]), _MARKS):
            yield line[start + 1 : start + 1 + match.start()], start + 1 + match.end()
    for end in ends:
        yield line[start:end], end
    word, end = _shell_word(line, start)
    yield word, end
    while word and _is_mark(word[-1], _AFTER) and line[end - 1] == word[-1]:
        word, end = word[:-1], end - 1
        yield word, end


def _shell_word(line: str, start: int) -> tuple[str, int]:
    """The word here, with quotes and backslashes taken away, and where it ends."""
    rest = io.StringIO(line[start : start + _LONGEST])
    words = shlex.shlex(rest, posix=True)
    words.whitespace_split, words.commenters, words.whitespace = True, "", " \t"
    try:
        word = words.get_token() or ""
    except ValueError:  # a quote stays open
        return "", start
    end = start + rest.tell()
    return word, end - (line[end - 1] in " \t")


def _to_path(name: str) -> str:
    """The path that a name stands for: of a file: URL, and with ~ for the home folder."""
    if name[:7].lower() == "file://":
        return unquote(name[7:].removeprefix("localhost"))
    return os.path.expanduser(name)  # noqa: PTH111 - Path's would take the ./ away


def _is_file(path: str) -> bool:
    return is_file(Path(path))


def _is_path(path: str) -> bool:
    """Whether a text is a file's path, and not a word that happens to be one."""
    return ("/" in path or "." in path) and _is_file(path)


def _has_ending(path: str) -> bool:
    return Path(path).suffix.lower() in image_endings() or is_film(path)


def _is_shown(path: str) -> bool:
    return _has_ending(path) and _is_file(path)


def _is_mark(letter: str, marks: str) -> bool:
    """Whether a letter is one of some marks, or punctuation beyond ASCII: full-width and such."""
    return letter in marks or (ord(letter) > 127 and unicodedata.category(letter)[0] == "P")


def _has_words(text: str) -> bool:
    return any(letter.isalnum() for letter in text)
