"""The decoder's memory of keys and values, with the duck type of mlx-lm's caches."""

from __future__ import annotations

import mlx.core as mx


class KVCache:
    """Keys and values of one layer, (B, heads, L, head width), grown in steps.

    Attributes:
        offset: how many positions are stored.
    """

    step = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends new positions and returns all of them."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = self._store(self.keys, keys, start)
        self.values = self._store(self.values, values, start)
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def _store(self, buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
        B, heads, _, dims = new.shape
        if buffer is None or self.offset > buffer.shape[2]:
            stored = [] if buffer is None else [buffer[..., :start, :]]
            capacity = -(-self.offset // self.step) * self.step
            free = mx.zeros((B, heads, capacity - start, dims), new.dtype)
            buffer = mx.concatenate([*stored, free], axis=2)
        buffer[..., start : self.offset, :] = new
        return buffer

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """The stored keys and values; there must be some."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    @state.setter
    def state(self, state: tuple[mx.array, mx.array]) -> None:
        self.keys, self.values = state
        self.offset = self.keys.shape[2]

    def trim(self, n: int) -> int:
        """Forgets the last `n` positions, or all if there are fewer; returns how many."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    def is_trimmable(self) -> bool:
        """mlx-lm asks before it trims."""
        return True
