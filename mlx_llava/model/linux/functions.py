"""Functions of MLX arrays that NumPy computes, on Linux's CPU.

MLX's CPU backend on Linux takes exp one number at a time, and its matmul of one row reads weights
at half the speed of memory; NumPy, which is vectorised and whose wheels bring an OpenBLAS, does
what is large and in float32. Gradients stay MLX's, and so does all that `mx.compile` traces, which
has no values to give to NumPy. On a GPU, they do what MLX does.

B rows, H heads, L queries, T keys, D head width.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, TypeAlias, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_llava.model import layers
from mlx_llava.model.layers import Mask
from mlx_llava.model.linux import rows
from mlx_llava.model.linux.products import multiply
from mlx_llava.model.linux.rows import gated
from mlx_llava.model.linux.threads import EXP, parallel, sharing
from mlx_llava.model.linux.weights import Array, Plain

Function: TypeAlias = "Callable[..., mx.array]"

#: Below this many multiplications, going to NumPy and back (about 20 us) does not pay.
SMALLEST = 1 << 17
#: How many numbers are worked on at a time, so that they stay in a core's cache (1 MB).
BLOCK = 1 << 18
#: Whether NumPy does anything. Read at every call: False makes all operations MLX's own.
NUMPY = sys.platform == "linux" and os.environ.get("MLX_LLAVA_BLAS") != "off"


def fits(work: int, *arrays: mx.array) -> bool:
    """Whether NumPy should do some work: on this device, on these arrays."""
    return (
        NUMPY
        and work >= SMALLEST
        and all(array.dtype == mx.float32 for array in arrays)
        and mx.default_device() == mx.cpu
    )


def view(array: mx.array) -> Array:
    """The values of an array, not copied."""
    return np.array(array, copy=False)


def by_numpy(numpy: Callable[..., Array], mlx: Function, *arrays: mx.array) -> mx.array:
    """Calls a function of NumPy arrays in the place of MLX's, whose gradient it has."""

    @mx.custom_function
    def function(*arrays: mx.array) -> mx.array:
        mx.eval(arrays)  # all at once
        return mx.array(numpy(*map(view, arrays)))

    @function.vjp
    def _vjp(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        primals = primals if isinstance(primals, tuple) else (primals,)
        return tuple(mx.vjp(mlx, list(primals), [cotangent])[1])

    try:
        return cast("mx.array", function(*arrays))
    except ValueError:  # mx.compile traces: there are no values yet
        return mlx(*arrays)


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """``x @ weight.T``: (..., inputs) and (outputs, inputs) -> (..., outputs)."""
    if fits(x.size * len(weight), x, weight):
        return by_numpy(_numpy_matmul, lambda x, weight: x @ weight.T, x, weight)
    return x @ weight.T


def _numpy_matmul(x: Array, weight: Array) -> Array:
    return multiply(x, Plain(weight))[0]


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask = None
) -> mx.array:
    """As mx.fast.scaled_dot_product_attention: (B, H, L, D), keys and values (B, heads, T, D)."""
    mlx = partial(mx.fast.scaled_dot_product_attention, scale=scale, mask=mask)
    if fits(queries.size * keys.shape[2], queries, keys, values):
        return by_numpy(partial(numpy_attention, scale, mask), mlx, queries, keys, values)
    return mlx(queries, keys, values)


def attention_at_once(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask = None
) -> mx.array:
    """As `attention`, of values that are there when it returns and have no gradient."""
    if not keys.dtype == values.dtype == mx.float32:
        return attention(queries, keys, values, scale=scale, mask=mask)
    mx.eval(queries, keys, values)
    return mx.array(numpy_attention(scale, mask, *map(view, (queries, keys, values))))


def numpy_attention(scale: float, mask: Mask, queries: Array, keys: Array, values: Array) -> Array:
    """`attention` of NumPy's arrays."""
    B, H, L, D = queries.shape
    output = np.empty((B, L, H, D), np.float32)  # as the layer after it reads it
    hidden = [~row[0] for row in view(mask)] if isinstance(mask, mx.array) else [None]
    for i in range(B):
        own = hidden[min(i, len(hidden) - 1)]
        _attend(output[i], scale, queries[i], keys[i], values[i], own, isinstance(mask, str))
    return output.swapaxes(1, 2)


def _attend(
    output: Array,
    scale: float,
    queries: Array,
    keys: Array,
    values: Array,
    hidden: Array | None,
    causal: bool,
) -> None:
    """One row's attention, (L, H, D), in blocks of heads and queries.

    No score that the causal mask hides is taken.
    """
    (H, L, D), (heads, T, _) = queries.shape, keys.shape
    group = H // heads
    size = 2 * H * L * T * D
    together = min(max(1, BLOCK // (L * T * group)), -(-heads // sharing(size)))
    step = max(16, BLOCK // (T * group))
    later = ~np.tri(min(step, L), dtype=bool)
    blocks = list(product(range(0, heads, together), range(0, L, step)))
    exponentiate = rows.of(size).exponentiate

    def attend(head: int, start: int) -> None:
        block = slice(start, min(start + step, L))
        count, seen = block.stop - start, T - L + block.stop if causal else T
        own = slice(head, min(head + together, heads))
        mine = slice(own.start * group, own.stop * group)
        asks = (queries[mine, block] * np.float32(scale)).reshape(-1, group * count, D)
        scores = asks @ keys[own, :seen].swapaxes(1, 2)
        by_query = scores.reshape(-1, count, seen)
        if causal:
            np.copyto(by_query[..., seen - count :], -np.inf, where=later[:count, :count])
        elif hidden is not None:
            np.copyto(by_query, -np.inf, where=hidden[block])
        by_row, sums = scores.reshape(-1, seen), np.empty((*scores.shape[:2], 1), np.float32)
        exponentiate(by_row, by_row.max(axis=1), sums.reshape(-1))
        mixed = (scores @ values[own, :seen]) / sums
        output[block, mine] = mixed.reshape(-1, count, D).swapaxes(0, 1)

    def part(start: int, stop: int) -> None:
        for block in blocks[start:stop]:
            attend(*block)

    parallel(part, len(blocks), size)


def quick_gelu(x: mx.array) -> mx.array:
    """As `layers.quick_gelu`."""
    return _gated(layers.quick_gelu, 1.702, x)


def gelu(x: mx.array) -> mx.array:
    """As nn.gelu."""
    return by_numpy(rows.gelu, nn.gelu, x) if fits(EXP * x.size, x) else nn.gelu(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """As `layers.gelu_tanh`."""
    return _gated(layers.gelu_tanh, math.sqrt(8 / math.pi), x, cubic=0.044715)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """As `layers.swiglu`."""
    return _gated(layers.swiglu, 1, gate, up)


def _gated(mlx: Function, slope: float, *arrays: mx.array, cubic: float = 0.0) -> mx.array:
    if fits(EXP * arrays[0].size, *arrays):
        return by_numpy(partial(gated, slope, cubic=cubic), mlx, *arrays)
    return mlx(*arrays)
