"""The samples that a run leaves out, listed as they are found: skipped.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_llava.json_files import JsonLines, field
from mlx_llava.tuner.samples import LeftOut


class Skipped:
    """Adds a line for each sample that is left out; in a run that goes on, only once."""

    def __init__(self, path: Path) -> None:
        """Goes on with a list, if there is one.

        Args:
            path (Path): The file, which is made when there is something to list.

        Raises:
            ValueError: It holds something else.
        """
        self._file = JsonLines(path, '{"file": ', errors="replace")
        records = self._file.read()
        self._listed = {_identity(record, field(record, "file", str, p)) for p, record in records}
        self._file.mend()

    def __call__(self, left_out: LeftOut) -> None:
        """Lists a sample."""
        place = left_out.place
        record = {"file": place.file, place.unit: place.number, "why": str(left_out.error)}
        identity = _identity(record, place.file)
        if identity in self._listed:
            return
        self._listed.add(identity)
        self._file.add(record)


def _identity(record: dict[str, Any], file: str) -> str:
    return f"{file}, {record.get('line')}, {record.get('index')}"
