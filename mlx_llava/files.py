"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The longest name that is kept in a hidden one; file systems take 255 bytes, some fewer.
_LONGEST = 100


def hidden(path: Path, ending: str) -> Path:
    """A hidden path beside another, always the same, with a name that is never too long."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return path.with_name(f".{name}{ending}")


def expand_home(path: str | Path) -> Path:
    """A path with ``~`` as the home folder, or as it is where there is no such user.

    (`Path.expanduser` raises RuntimeError there.)
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111


@contextmanager
def whole_file(path: Path, ending: str = "") -> Iterator[Path]:
    """Gives a hidden path beside `path` to write to; what is there takes its place at the end.

    Args:
        path (Path): The file to make or to replace; of a link, what it leads to.
        ending (str): What the hidden path must end in.
    """
    path = path.resolve()
    beside = hidden(path, f".partial{ending}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def is_file(path: Path) -> bool:
    """Whether there is a file; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
