"""The decoder's memory of keys and values, with the duck type of mlx-lm's caches.

H heads, L new positions, T = stored + new positions, D head width.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_llava.model.layers import Mask
from mlx_llava.model.positions import IN_ORDER, Positions, positions_of
from mlx_llava.model.text_config import TextConfig

if TYPE_CHECKING:
    from mlx_llava.model.batch_cache import BatchLayer

Attention: TypeAlias = Callable[..., mx.array]


class LayerCache(Protocol):
    """What one layer stores: a `KVCache`, or one of mlx-lm's.

    Attributes:
        keys: (B, heads, capacity, head width), or the codes, scales and biases of such; None
            where nothing is stored.
        values: as the keys.
        offset: how many positions are stored.
    """

    keys: Any
    values: Any
    offset: int

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Appends new positions and returns all of them."""

    def is_trimmable(self) -> bool:
        """Whether `trim` can be asked."""

    def trim(self, n: int) -> int:
        """Forgets the last `n` positions, or all if there are fewer; returns how many."""


#: One for every layer.
Cache: TypeAlias = list[LayerCache]
Layer = TypeVar("Layer", bound=LayerCache)


class KVCache:
    """Keys and values of one layer, (B, heads, L, head width), grown in steps.

    Attributes:
        offset: how many positions are stored.
        positions: where they stand, if some before them were left out.
    """

    step = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self.positions = IN_ORDER

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


class RollingKVCache(KVCache):
    """Keeps the first positions for good, and of the others the last ones.

    Keys are stored with their rotation, so that the order of positions in memory means nothing
    to a query that sees all of them (Xiao et al. 2023, arXiv:2309.17453, keep the first few).

    Attributes:
        max_size: how many positions are stored at most.
        keep: how many of the first are never dropped.
    """

    def __init__(self, max_size: int, keep: int) -> None:
        super().__init__()
        self.max_size, self.keep = max_size, keep

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends new positions; a single one takes the oldest's slot when there is no more."""
        if self.offset + keys.shape[2] <= self.max_size:
            return super().update_and_fetch(keys, values)
        if keys.shape[2] > 1 or self.keys is None or self.values is None:
            raise ValueError(
                f"{self.offset + keys.shape[2]} positions do not fit a cache of {self.max_size}."
            )
        slot = self.keep + (self.offset - self.keep) % (self.max_size - self.keep)
        self.keys[..., slot : slot + 1, :] = keys
        self.values[..., slot : slot + 1, :] = values
        self.offset += 1
        return self.keys[..., : self.max_size, :], self.values[..., : self.max_size, :]

    def is_trimmable(self) -> bool:
        """Not once a position has been dropped."""
        return self.offset <= self.max_size


def attend(
    cache: LayerCache | BatchLayer | None,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    attention: Attention,
    scale: float,
    mask: Mask | list[Mask],
) -> mx.array:
    """Stores new keys and values, and lets the queries see all that are stored.

    Args:
        cache (optional): What came before.
        queries (mx.array): (B, H, L, D).
        keys (mx.array): (B, heads, L, D).
        values (mx.array): As the keys.
        attention (callable): MLX's, or what stands for it.
        scale (float): What scores are multiplied with.
        mask (optional): What may be seen.

    Returns:
        mx.array: (B, H, L, D).
    """
    if cache is not None and hasattr(cache, "attend"):
        return cache.attend(queries, keys, values, attention=attention, scale=scale, mask=mask)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    if hasattr(cache, "bits"):
        from mlx_lm.models.base import scaled_dot_product_attention

        return scaled_dot_product_attention(queries, keys, values, cache, scale=scale, mask=mask)
    return attention(queries, keys, values, scale=scale, mask=mask)


def make_cache(
    config: TextConfig,
    prompt_tokens: int = 0,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
) -> Cache:
    """An empty cache for one prompt.

    Args:
        config (TextConfig): The decoder's.
        prompt_tokens (int): The length of the prompt.
        kv_bits (int, optional): Stores keys and values in 2, 4 or 8 bits (mlx-lm's cache).
        max_kv_size (int, optional): Stores that many positions at most: the prompt, its system
            text and pictures with it, and the last ones of the answer.

    Raises:
        ValueError: The two exclude each other, or do not fit the model or the prompt.
    """
    layers = range(config.num_hidden_layers)
    if max_kv_size is None:
        if kv_bits is None:
            return [KVCache() for _ in layers]
        return _quantized_cache(len(layers), config.dims_per_head, kv_bits)
    if kv_bits is not None:
        raise ValueError(
            f"kv_bits is {kv_bits} and max_kv_size is {max_kv_size}; a cache can have one of them."
        )
    if any(config.windows):
        raise ValueError(
            f"max_kv_size is {max_kv_size}, but this model has a sliding window of its own, "
            f"{config.sliding_window} tokens."
        )
    if max_kv_size <= prompt_tokens:
        raise ValueError(
            f"max_kv_size is {max_kv_size} and the prompt, which is kept, has {prompt_tokens} "
            "tokens; use more, or a shorter prompt."
        )
    return [RollingKVCache(max_kv_size, prompt_tokens) for _ in layers]


def _quantized_cache(layers: int, dims: int, bits: int) -> Cache:
    size = group_size(dims)
    if size is None or bits not in (2, 4, 8):
        raise ValueError(
            f"kv_bits is {bits} and a head has {dims} dimensions; known: 2, 4 or 8, for a "
            "multiple of 32."
        )
    from mlx_lm.models.cache import QuantizedKVCache

    return [QuantizedKVCache(size, bits) for _ in range(layers)]


def group_size(dims: int) -> int | None:
    """How many numbers of a head share a scale when they are quantised; None if none fits."""
    return next((size for size in (64, 32) if dims % size == 0), None)


def fork(cache: Cache, length: int, like: Cache | None = None) -> Cache:
    """A second cache that begins with the first `length` positions of one, which stays.

    Args:
        cache (list): What is stored.
        length (int): How much of it.
        like (list, optional): The limits of the new one, of the same kind; default: the old one's.
    """
    return [_fork(*layers, length) for layers in zip(cache, like or cache, strict=True)]


def _fork(layer: LayerCache, like: Layer, length: int) -> Layer:
    new = copy.copy(like)
    new.keys, new.values = tree_map(lambda a: a[..., :length, :], (layer.keys, layer.values))
    new.offset = length
    set_positions([new], positions_of(layer).upto(length))
    return new


def set_positions(cache: Cache, positions: Positions) -> None:
    """Tells a cache, of whatever kind, where what it stores and what follows stands."""
    for layer in cache:
        if positions is not positions_of(layer):
            layer.positions = positions  # type: ignore[attr-defined]


def room(cache: Cache) -> int:
    """How many positions can be added together; only a cache that rolls has a limit."""
    return getattr(cache[0], "max_size", sys.maxsize) - cache[0].offset


def nbytes(cache: Cache) -> int:
    """The memory of a cache, in bytes."""
    arrays: dict[str, mx.array] = dict(
        tree_flatten([(layer.keys, layer.values) for layer in cache])
    )
    return sum(array.nbytes for array in arrays.values())
