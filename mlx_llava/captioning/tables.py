"""Files with a line for each picture, which are added to whatever interrupts it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_llava.captioning.questions import TEXT, as_text
from mlx_llava.files import add_bytes, whole_file
from mlx_llava.json_files import JsonLines, read_bytes

_BOM = "\ufeff"
_FIELD = '"([^"]*(?:""[^"]*)*)"'
#: What spreadsheets compute instead of showing it, perhaps behind what makes them show it.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_SHOWN = re.compile("'" + _FORMULA.pattern)


class Lines(JsonLines):
    """A file of JSON lines, ``{"image": ..., column: ...}``."""

    def __init__(self, path: Path, columns: Sequence[str] = (TEXT,)) -> None:
        super().__init__(path, '{"image": "', errors="surrogateescape")
        self.columns = columns

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """The image of each line, and what it says.

        Raises:
            ValueError: There is something that this command did not write; of all stores.
        """
        is_ours = all(line.startswith(self.head) for line in self.whole().splitlines())
        lines = [line for _, line in self.read()] if is_ours else []
        if not is_ours or any(tuple(line) != ("image", *self.columns) for line in lines):
            raise ValueError(
                f"{self.path} holds lines that this command did not write, or of other columns."
            )
        return [(line.pop("image"), line) for line in lines]

    def write(self, image: str, values: Mapping[str, Any]) -> None:
        """Keeps a caption for good."""
        self.add({"image": image, **values})


class Table:
    """A CSV file for spreadsheets: a byte-order mark, quotes around all, and no formulas."""

    def __init__(self, path: Path, columns: Sequence[str] = (TEXT,)) -> None:
        self.path, self.columns = path, columns
        self.head = _row(["image", *columns])
        self._pattern = re.compile(",".join([_FIELD] * (1 + len(columns))) + "\n")

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """See `Lines`."""
        whole, cut = self._read()
        whole = whole.removeprefix(_BOM)
        rows = list(self._pattern.finditer(whole))
        begins = ['"'] if rows else [self.head, _BOM + self.head]
        is_whole = whole == "".join(row[0] for row in rows)
        is_ours = is_whole and whole.startswith(self.head if rows else "")
        if not is_ours or not any(_agree(cut, begin) for begin in begins):
            raise ValueError(
                f"{self.path} holds rows that this command did not write, or of other columns."
            )
        cells = [list(map(_uncell, row.groups())) for row in rows[1:]]
        return [(image, dict(zip(self.columns, own, strict=True))) for image, *own in cells]

    def mend(self) -> None:
        """Takes away what a kill has left half written."""
        whole, cut = self._read()
        if cut:
            with whole_file(self.path) as beside:
                beside.write_bytes(whole.encode(errors="surrogateescape"))

    def write(self, image: str, values: Mapping[str, Any]) -> None:
        """Keeps a caption for good."""
        is_new = not self.path.exists() or not self.path.stat().st_size
        row = _row([image, *map(as_text, values.values())])
        rows = f"{_BOM + self.head if is_new else ''}{row}"
        add_bytes(self.path, rows.encode(errors="surrogateescape"))

    def _read(self) -> tuple[str, str]:
        """The whole rows, after which no quotation is open, and what a kill has left of one."""
        data = read_bytes(self.path) if self.path.exists() else b""
        text = data.decode(errors="surrogateescape")
        end = text.rfind("\n") + 1
        while text.count('"', 0, end) % 2:
            end = text.rfind("\n", 0, end - 1) + 1
        return text[:end], text[end:]


def _agree(cut: str, begin: str) -> bool:
    """Whether one of two begins as the other, byte by byte, as a kill may cut a character."""
    one, other = cut.encode(errors="surrogateescape"), begin.encode()
    return one.startswith(other) or other.startswith(one)


def _row(texts: Sequence[str]) -> str:
    return ",".join(f'"{_cell(text)}"' for text in texts) + "\n"


def _cell(text: str) -> str:
    """A text as it stands between quotes; ``'`` makes spreadsheets show what they would compute."""
    return ("'" + text if _FORMULA.match(text) else text).replace('"', '""')


def _uncell(cell: str) -> str:
    text = cell.replace('""', '"')
    return text[1:] if _SHOWN.match(text) else text
