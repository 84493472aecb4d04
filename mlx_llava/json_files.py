"""JSON as people's files hold it: one reader for settings, and one for records.

Text is UTF-8, with or without a byte-order mark. Only a line feed ends a line: U+2028, U+0085 and
the like may stand in strings (RFC 8259, 7), and Python's ``splitlines`` would cut there.
"""

from __future__ import annotations

import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_llava.files import add_bytes, whole_file

_BOM = "\ufeff"
_REQUIRED = object()
#: What Python says of values that are not of the kind that a program counts on.
_NONSENSE = (
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
)
_WHITE = " \t\r\n"
#: How files begin that are often still packed.
_PACKED = {b"\x1f\x8b": "gzip", b"PK\3\4": "a ZIP archive", b"PAR1": "Parquet"}
#: What looks like half a surrogate pair, which may stand in JSON (RFC 8259, 8.2) and is no text.
_HALF = re.compile(
    r"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])"
)
_KINDS: Mapping[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands: ``train.jsonl, line 3``, or ``train.json, index 2`` of a list."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


def decode(data: bytes, name: str, line: int = 1) -> str:
    """The text of a file, or of one line of it.

    Args:
        data (bytes): What to decode.
        name (str): The file, for errors.
        line (int): The number of the first line in `data`, from 1.

    Raises:
        ValueError: It is not UTF-8.
    """
    if line == 1:
        _check_encoding(data, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        raise ValueError(
            f"{name}, line {line + before.count(10)} is not UTF-8 (its byte "
            f"{error.start - before.rfind(10)} is 0x{data[error.start]:02x}); save it as UTF-8."
        ) from error


def _check_encoding(data: bytes, name: str) -> None:
    for beginning, kind in _PACKED.items():
        if data.startswith(beginning):
            raise ValueError(f"{name} is {kind}, expected text; unpack it first.")
    encoding = json.detect_encoding(data[:4])
    if not encoding.startswith("utf-8"):
        raise ValueError(f"{name} is {encoding.upper()}, expected UTF-8; save it as UTF-8.")


def parse(text: str, name: str, line: int = 1) -> Any:
    """The value of a JSON text.

    NaN and Infinity are read, as transformers writes them into config.json.

    Args:
        text (str): One JSON value.
        name (str): Where it is from, for errors.
        line (int): The number of its first line.

    Raises:
        ValueError: It is not JSON, is nested too deeply for Python, has a whole number of more
            than 4,300 digits, half a surrogate pair, or two different values under one key.
    """
    text = text.removeprefix(_BOM)
    if not text.strip(_WHITE):
        raise ValueError(f"{name} is empty, expected JSON.")
    try:
        value = json.loads(text, object_pairs_hook=_object)
        half = _HALF.search(text)
        if half:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        line, why = line + error.lineno - 1, f"{error.msg}, column {error.colno}"
    except RecursionError:
        why = "it is nested too deeply"
    except UnicodeEncodeError as error:
        line += text.count("\n", 0, half.start() if half else 0)
        why = f"{error.object[error.start]!a} is half of a character"
    except ValueError as error:
        why = str(error).partition("; use sys")[0]
    else:
        return value
    raise ValueError(f"{name} is not valid JSON (line {line}): {why}.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        for key, own in pairs:
            if value[key] != own:
                raise ValueError(f"an object has the key {key!r:.60} twice, with different values")
    return value


def is_pointer(data: bytes) -> bool:
    """Whether this is what Git LFS puts in a file's place where it has not fetched it."""
    return data.startswith(b"version https://git-lfs.github.com/spec/")


def read_bytes(path: Path) -> bytes:
    """What a file, or a pipe, holds; ValueError for a device, which may never end."""
    if path.is_char_device() and path != Path(os.devnull):
        raise ValueError(f"{path} is a device, expected a file.")
    return path.read_bytes()


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        ValueError: It is in another encoding, or only Git LFS's pointer to a file.
    """
    data = read_bytes(path)
    if is_pointer(data):
        raise ValueError(f"{path} is only Git LFS's pointer to the file: run git lfs pull.")
    return decode(data, str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, or {} where there is none.

    Raises:
        ValueError: The file is not a JSON object; see `parse`.
    """
    if not path.exists():
        return {}
    data = parse(read_text(path), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {_kind(data)}, expected an object.")
    return data


def numbered_lines(file: Iterable[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a binary file that are not blank, numbered from 1.

    Raises:
        ValueError: The first is UTF-16 or UTF-32.
    """
    for number, line in enumerate(file, 1):
        if number == 1:
            _check_encoding(line, name)
        if line.removeprefix(BOM_UTF8).strip():
            yield number, line


def read_records(path: Path) -> Iterator[tuple[Place, Any]]:
    """The records of a file: a JSON list, or one JSON value a line.

    Yields:
        tuple: Where a record stands, and what it is.

    Raises:
        ValueError: It is neither.
    """
    name, text = str(path), read_text(path)
    if text.lstrip(_WHITE).startswith("["):
        for index, value in enumerate(parse(text, name)):
            yield Place(name, "index", index), value
        return
    yield from _parse_lines(text, name)


def _parse_lines(text: str, name: str) -> Iterator[tuple[Place, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.removeprefix(_BOM).strip(_WHITE):
            yield Place(name, "line", number), parse(line, name, number)


def field(
    record: Any,
    key: str,
    kinds: type | tuple[type, ...],
    place: object,
    default: Any = _REQUIRED,
) -> Any:
    """What a record has under a key.

    Args:
        record: What should be an object.
        key (str): The key.
        kinds (type or tuple of type): What its value may be, of JSON's types.
        place: Where the record stands, for errors.
        default (optional): What a key that is not there means.

    Raises:
        ValueError: It is no object, lacks a key that has no default, or has a value of another
            kind.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(record, Mapping):
        raise ValueError(f"{place} holds {_kind(record)}, expected an object with {key}.")
    if key not in record and default is not _REQUIRED:
        return default
    if key not in record:
        raise ValueError(f"{place} has no {key:.80}; it has {', '.join(record) or 'nothing':.200}.")
    value = record[key]
    if type(value) not in kinds:
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise ValueError(f"{place} has {_kind(value)} as {key}, expected {expected}.")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, (int, float, bool)):
        return f"{_KINDS[type(value)]} ({json.dumps(value):.40})"
    return _KINDS.get(type(value), type(value).__name__)


class JsonLines:
    """A file of JSON lines that a command adds to, whatever interrupts it.

    A last line that was cut off while it was written is no record, and goes before the next one.
    """

    def __init__(self, path: Path, head: str, errors: str = "strict") -> None:
        """Names a file, which is made when there is something to write.

        Args:
            path (Path): The file.
            head (str): What the command's lines begin with, which tells its own cut off line from
                a line of somebody else's.
            errors (str): What becomes of names of files that are no text; see `str.encode`.
        """
        self.path, self.head, self._errors = path, head.encode(), errors

    def read(self) -> list[tuple[Place, Any]]:
        """The records as of `read_records`; none where there is no file.

        Raises:
            ValueError: A line is no JSON.
        """
        return list(_parse_lines(self._decode(self.whole()), str(self.path)))

    def mend(self) -> None:
        """Makes the file end in a whole line, so that the next one stands alone."""
        lines = self.whole()
        if self.path.exists() and self.path.stat().st_size != len(lines):
            with whole_file(self.path) as beside:
                beside.write_bytes(lines)

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a line."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        add_bytes(self.path, line.encode(errors=self._errors))

    def _decode(self, data: bytes) -> str:
        if self._errors == "surrogateescape":
            return data.decode(errors=self._errors)
        return decode(data, str(self.path))

    def whole(self) -> bytes:
        """What the file holds of whole lines, and of somebody else's."""
        data = read_bytes(self.path) if self.path.exists() else b""
        whole, end, last = data.rpartition(b"\n")
        if not last:
            return data
        try:
            parse(self._decode(last), str(self.path))
        except ValueError:
            is_ours = last.startswith(self.head) or self.head.startswith(last)
            return whole + end if is_ours else data
        return data + b"\n"


@contextmanager
def sensible_values(name: str | Path) -> Iterator[None]:
    """Turns Python's complaints about values of the wrong kind into one about a checkpoint.

    Config files are data from anywhere: a text where a number belongs is their author's mistake.
    """
    try:
        yield
    except _NONSENSE as error:
        kind = type(error).__name__
        raise ValueError(
            f"A JSON file of {name} has a value of the wrong kind ({kind}: {error})."
        ) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes an object for people and programs to read."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
