"""Keys and values of rows that are decoded together, each of its own length.

A step takes one new token of each row, or several of some. `RaggedCache` leaves each row a cache
of its own and attends row by row, so that nothing is padded: best on a CPU. `SlotCache` has all
rows in one array and attends once for all: few launches, for a GPU.

B rows, S slots, N new tokens of all rows, T the longest row, H heads, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llava.model.cache import (
    Attention,
    Cache,
    KVCache,
    LayerCache,
    attend,
    nbytes,
    set_positions,
)
from mlx_llava.model.device import on_cpu
from mlx_llava.model.layers import Mask, attention_mask_of, visible
from mlx_llava.model.positions import Positions, positions_of


def make_batch_cache(kv_bits: int | None = None) -> BatchCache:
    """The form that is fastest on this device; codes have one only."""
    return RaggedCache() if on_cpu() or kv_bits is not None else SlotCache()


class BatchCache(ABC):
    """Rows by number; where one leaves, the last one takes its number."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory that it takes."""

    @abstractmethod
    def positions(self, lengths: Sequence[int]) -> int:
        """How many positions it has memory for when rows are so long."""

    @abstractmethod
    def join(self, cache: Cache) -> None:
        """Takes another row, with what it has stored."""

    @abstractmethod
    def leave(self, row: int) -> None:
        """Forgets a row."""

    @abstractmethod
    def extract(self, row: int) -> Cache:
        """What a row has stored, as a cache of its own."""

    @abstractmethod
    def step(self, counts: Sequence[int]) -> list[BatchLayer]:
        """Makes room for new tokens, so many of each row and at least one.

        Returns:
            A cache for each layer, which takes the new tokens of all rows, one after the other.
        """


@dataclass
class BatchLayer(ABC):
    """What one layer has stored of each row, during one step.

    Attributes:
        offsets: how many positions of each row were stored before.
        counts: how many new tokens each row has.
        starts: the position of each new token, (N,).
        positions: those of each row.
    """

    offsets: list[int]
    counts: list[int]
    starts: mx.array
    positions: list[Positions]

    def mask(self, window: int | None) -> Mask | list[Mask]:
        """What the new tokens may see, where there is a sliding window or none."""
        rows = zip(self.counts, self.offsets, self.positions, strict=True)
        return [
            attention_mask_of(count, offset, window, None, positions.jumping(offset + count))
            for count, offset, positions in rows
        ]

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        attention: Attention,
        scale: float,
        mask: Mask | list[Mask],
    ) -> mx.array:
        """As `cache.attend`, of new tokens (N, H, 1, D), row by row."""
        assert isinstance(mask, list)
        ends = list(accumulate(self.counts))[:-1]
        parts = [mx.split(array, ends) for array in (queries, keys, values)]
        rows = [
            self._attend_row(i, *map(_turned, new), attention=attention, scale=scale, mask=mask[i])
            for i, new in enumerate(zip(*parts, strict=True))
        ]
        return mx.concatenate([_turned(row) for row in rows])

    @abstractmethod
    def _attend_row(self, row: int, *new: mx.array, attention: Attention, **how: Any) -> mx.array:
        """`cache.attend` of one row's new tokens, (1, H, count, D)."""


def _slots(offsets: Sequence[int], counts: Sequence[int]) -> mx.array:
    """Which of its row's each new token is, (N,)."""
    rows = zip(offsets, counts, strict=True)
    return mx.array([offset + i for offset, count in rows for i in range(count)])


def _starts(
    slots: mx.array, positions: Sequence[Positions], offsets: Sequence[int], counts: Sequence[int]
) -> mx.array:
    """Where that is, (N,)."""
    if not any(row.parts for row in positions):
        return slots
    rows = zip(positions, offsets, counts, strict=True)
    return mx.array(np.concatenate([row.of(start + n)[start:] for row, start, n in rows]))


def _turned(row: mx.array) -> mx.array:
    """(count, H, 1, D) <-> (1, H, count, D)."""
    return row if row.shape[0] == row.shape[2] else row.swapaxes(0, 2)


class RaggedCache(BatchCache):
    """Each row has a cache of its own."""

    def __init__(self) -> None:
        self._rows: list[Cache] = []

    @property
    def nbytes(self) -> int:
        return sum(map(nbytes, self._rows))

    def positions(self, lengths: Sequence[int]) -> int:
        return sum(map(_rounded, lengths))

    def join(self, cache: Cache) -> None:
        self._rows.append(cache)

    def leave(self, row: int) -> None:
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def extract(self, row: int) -> Cache:
        return self._rows[row]

    def step(self, counts: Sequence[int]) -> list[BatchLayer]:
        offsets = [row[0].offset for row in self._rows]
        positions = [positions_of(row[0]) for row in self._rows]
        starts = _starts(_slots(offsets, counts), positions, offsets, counts)
        new = offsets, list(counts), starts, positions
        return [_RaggedLayer(*new, caches) for caches in zip(*self._rows, strict=True)]


@dataclass
class _RaggedLayer(BatchLayer):
    caches: Sequence[LayerCache]

    def _attend_row(self, row: int, *new: mx.array, attention: Attention, **how: Any) -> mx.array:
        return attend(self.caches[row], *new, attention=attention, **how)


class SlotCache(BatchCache):
    """Row i is in slot i of one array for each layer's keys, and one for its values.

    What a slot holds beyond its row is finite, and never seen.

    Attributes:
        arrays: keys and values of the layers in turn, (S, H, capacity, D).
    """

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []
        self._lengths: list[int] = []
        self._positions: list[Positions] = []

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def positions(self, lengths: Sequence[int]) -> int:
        slots, capacity = self._size(len(lengths), max(lengths))
        return slots * capacity

    def _size(self, rows: int, length: int) -> tuple[int, int]:
        """How many slots there must be, and of which capacity; neither shrinks."""
        slots, capacity = self.arrays[0].shape[::2] if self.arrays else (1, 0)
        while slots < rows:
            slots *= 2
        return slots, max(capacity, _rounded(length))

    def join(self, cache: Cache) -> None:
        length = cache[0].offset
        stored = [a[..., :length, :] for layer in cache for a in (layer.keys, layer.values)]
        self._lengths.append(length)
        self._positions.append(positions_of(cache[0]))
        if not self.arrays:
            self.arrays = stored
        self._reserve(length + 1)
        self._write(len(self._lengths) - 1, self._filled(stored))

    def _reserve(self, length: int) -> None:
        size = self._size(len(self._lengths), length)
        if size != self.arrays[0].shape[::2]:
            self.arrays = [_padded(array, *size) for array in self.arrays]

    def _filled(self, stored: Iterable[mx.array]) -> list[mx.array]:
        """Arrays for one slot, from its beginning to its end."""
        return [_padded(one, 1, self.arrays[0].shape[2]) for one in stored]

    def _write(self, row: int, filled: Iterable[mx.array]) -> None:
        for array, one in zip(self.arrays, filled, strict=True):
            array[row : row + 1] = one

    def _stored(self, row: int) -> Iterator[mx.array]:
        length = self._lengths[row]
        return (array[row : row + 1, :, :length] for array in self.arrays)

    def leave(self, row: int) -> None:
        last = len(self._lengths) - 1
        if row < last:
            moved = self._filled(self._stored(last))
            mx.eval(moved)  # a view of another slot would forbid writing in place
            self._write(row, moved)
            self._lengths[row] = self._lengths[last]
            self._positions[row] = self._positions[last]
        self._lengths.pop()
        self._positions.pop()
        if not last:
            self.arrays = []

    def extract(self, row: int) -> Cache:
        stored = self._stored(row)
        cache: Cache = []
        for keys, values in zip(stored, stored, strict=True):
            cache.append(KVCache())
            cache[-1].update_and_fetch(keys, values)  # into memory of its own
        set_positions(cache, self._positions[row])
        return cache

    def step(self, counts: Sequence[int]) -> list[BatchLayer]:
        offsets = list(self._lengths)
        self._lengths = [n + count for n, count in zip(offsets, counts, strict=True)]
        self._reserve(max(self._lengths))
        slots, positions = _slots(offsets, counts), list(self._positions)
        starts = _starts(slots, positions, offsets, counts)
        rows = mx.array([row for row, count in enumerate(counts) for _ in range(count)])
        index = rows[:, None], mx.arange(self.arrays[0].shape[1]), slots[:, None]
        layers = zip(self.arrays[::2], self.arrays[1::2], strict=True)
        new = offsets, list(counts), starts, positions
        return [_SlotLayer(*new, *layer, index) for layer in layers]


@dataclass
class _SlotLayer(BatchLayer):
    keys: mx.array
    values: mx.array
    index: tuple[mx.array, mx.array, mx.array]  # where new tokens go: rows, heads, slots

    def mask(self, window: int | None) -> Mask | list[Mask]:
        if max(self.counts) > 1:
            return super().mask(window)
        length = max(self.offsets) + 1
        if not any(row.parts for row in self.positions):
            if len({*self.offsets}) == 1:
                return attention_mask_of(1, self.offsets[0], window, None)
            keys = mx.arange(length)
        else:
            keys = mx.array(np.stack([row.of(length) for row in self.positions]))[:, None, None]
        return visible(self.starts[:, None, None, None], keys, window)  # (B, 1, 1, T)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        attention: Attention,
        scale: float,
        mask: Mask | list[Mask],
    ) -> mx.array:
        self.keys[self.index] = keys[:, :, 0]
        self.values[self.index] = values[:, :, 0]
        if isinstance(mask, list):
            how: dict[str, Any] = {"attention": attention, "scale": scale, "mask": mask}
            return super().attend(queries, keys, values, **how)
        stored = self._stored(slice(0, len(self.counts)), max(self.offsets) + 1)
        return attention(queries, *stored, scale=scale, mask=mask)

    def _attend_row(self, row: int, *new: mx.array, attention: Attention, **how: Any) -> mx.array:
        length = self.offsets[row] + self.counts[row]
        return attention(new[0], *self._stored(slice(row, row + 1), length), **how)

    def _stored(self, rows: slice, length: int) -> tuple[mx.array, mx.array]:
        return self.keys[rows, :, :length], self.values[rows, :, :length]


def _rounded(length: int) -> int:
    return -(-length // KVCache.step) * KVCache.step


def _padded(array: mx.array, slots: int, capacity: int) -> mx.array:
    """Zeros around (s, H, length, D) -> (slots, H, capacity, D)."""
    s, _, length, _ = array.shape
    return mx.pad(array, [(0, slots - s), (0, 0), (0, capacity - length), (0, 0)])
