"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, ending: str = "") -> Iterator[Path]:
    """Gives a hidden path beside `path` to write to; what is there takes its place at the end.

    Args:
        path (Path): The file to make or to replace.
        ending (str): What the hidden path must end in.
    """
    beside = path.with_name(f".{path.name}.partial{ending}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
