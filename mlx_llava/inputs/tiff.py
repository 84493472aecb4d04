"""The first directory of a TIFF file, and of EXIF, which is one: TIFF 6.0, section 2.

Values are read whatever type they have, since cameras and editors write any. BigTIFF too.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass

ORIENTATION = 274
_TEXT = 2
#: One value of a type, as `struct` writes it.
_LAYOUTS = dict(enumerate("B B H L LL b B h l ll f d L".split(), 1)) | {16: "Q", 17: "q", 18: "Q"}
_MOST_TAGS = 4096


@dataclass(frozen=True)
class Directory:
    """Some tags of a file: the record of each is tag, type, count, and the value or its offset."""

    data: bytes
    order: str  # of its bytes, as `struct` writes it
    is_big: bool
    records: dict[int, bytes]

    def number(self, tag: int) -> float | None:
        """The first value of a tag as a number, or None where there is no finite one."""
        kind, value = self.value(tag)
        if kind == _TEXT:
            text = value.partition(b"\0")[0].strip()
            return int(text) if re.fullmatch(rb"\d{1,9}", text) else None
        try:
            first, *divisor = struct.unpack_from(self.order + _LAYOUTS.get(kind, "B"), value)
        except struct.error:
            return None
        if divisor == [0] or not math.isfinite(first):
            return None
        return float(first / divisor[0]) if divisor else float(first)

    def value(self, tag: int) -> tuple[int, bytes]:
        """The type of a tag's values and their bytes; none where there is no such tag."""
        if tag not in self.records:
            return 0, b""
        layout = "HHQ8s" if self.is_big else "HHL4s"
        _, kind, count, value = struct.unpack(self.order + layout, self.records[tag])
        # One value at least: there are files that count none.
        size = struct.calcsize("=" + _LAYOUTS.get(kind, "B")) * max(count, 1)
        if size > len(value):
            (at,) = struct.unpack(self.order + ("Q" if self.is_big else "L"), value)
            value = self.data[at : at + size]
        return kind, value[:size]

    def only(self, tags: frozenset[int]) -> bytes:
        """The file with a first directory of these tags alone, and none after it."""
        kept = [record for tag, record in sorted(self.records.items()) if tag in tags]
        count, offset, at = ("Q", "Q", 8) if self.is_big else ("H", "L", 4)
        size, odd = struct.calcsize(f"={offset}"), len(self.data) % 2
        start = struct.pack(self.order + offset, len(self.data) + odd)
        directory = struct.pack(self.order + count, len(kept)) + b"".join(kept) + bytes(size)
        rest = memoryview(self.data)[at + size :]
        return b"".join((self.data[:at], start, rest, bytes(odd), directory))


def read_directory(data: bytes) -> Directory | None:
    """The first directory of a file, or None where there is none.

    Raises:
        ValueError: It has more tags than any image.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16:
        return None
    is_big = b"\x2b" in data[2:4]
    (at,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}L", data, 8 if is_big else 4)
    head = data[at : at + (8 if is_big else 2)]
    count = int.from_bytes(head, "little" if order == "<" else "big")
    if count > _MOST_TAGS:
        raise ValueError(f"has {count:,} TIFF tags; the limit is {_MOST_TAGS:,}")
    records: dict[int, bytes] = {}
    size = 20 if is_big else 12
    for start in range(at + len(head), at + len(head) + count * size, size):
        record = data[start : start + size]
        if len(record) == size:
            records.setdefault(struct.unpack_from(f"{order}H", record)[0], record)
    return Directory(data, order, is_big, records)
