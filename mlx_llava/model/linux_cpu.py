"""The operations that take the time, each in the fastest form that the device has.

On a GPU that is MLX's own. MLX's CPU backend on Linux takes exp one number at a time, and its
matmul of one row reads weights at half the speed of memory; there, NumPy, which is vectorised and
whose wheels bring an OpenBLAS, does what is large and in float32. Gradients stay MLX's, and so does
all that `mx.compile` traces, which has no values to give to NumPy.

B rows, H heads, L queries, T keys, D head width.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, TypeAlias, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Function: TypeAlias = "Callable[..., mx.array]"
Mask: TypeAlias = "mx.array | str | None"

#: Below this many multiplications, going to NumPy and back (about 20 us) does not pay.
SMALLEST = 1 << 17
#: How many numbers are worked on at a time, so that they stay in a core's cache (1 MB).
BLOCK = 1 << 18
#: An exp of MLX's takes as long as so many multiplications.
EXP = 32
#: Up to so many rows, products of a matrix and a vector are faster than one of matrices.
FEW = 4
NUMPY = sys.platform == "linux" and os.environ.get("MLX_LLAVA_BLAS") != "off"


def _fits(work: int, *arrays: mx.array) -> bool:
    """Whether NumPy should do some work: here, on this device, on these arrays."""
    return (
        NUMPY
        and work >= SMALLEST
        and all(array.dtype == mx.float32 for array in arrays)
        and mx.default_device() == mx.cpu
    )


def _view(array: mx.array) -> Array:
    """The values of an array, not copied."""
    return np.array(array, copy=False)


def _by_numpy(numpy: Callable[..., Array], mlx: Function, *arrays: mx.array) -> mx.array:
    """Calls a function of NumPy arrays in the place of MLX's, whose gradient it has."""

    @mx.custom_function
    def function(*arrays: mx.array) -> mx.array:
        mx.eval(arrays)  # all at once
        return mx.array(numpy(*map(_view, arrays)))

    @function.vjp
    def _vjp(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        primals = primals if isinstance(primals, tuple) else (primals,)
        return tuple(mx.vjp(mlx, list(primals), [cotangent])[1])

    try:
        return cast("mx.array", function(*arrays))
    except ValueError:  # mx.compile traces: there are no values yet
        return mlx(*arrays)


def _matmul(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


def _numpy_matmul(x: Array, weight: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    outputs = _few_rows(rows, weight) if len(rows) <= FEW else rows @ weight.T
    return outputs.reshape(*x.shape[:-1], -1)


def _few_rows(rows: Array, weight: Array) -> Array:
    """Row by row, each block of the weight for all rows while a cache holds it.

    A matmul of so few rows is bound by memory, and BLAS would copy the weight first.
    """
    outputs = np.empty((len(rows), len(weight)), np.float32)
    step = len(weight) if len(rows) == 1 else max(1, 4 * BLOCK // weight.shape[1])
    for start in range(0, len(weight), step):
        block = slice(start, start + step)
        for row, output in zip(rows, outputs, strict=True):
            np.dot(weight[block], row, out=output[block])
    return outputs


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """``x @ weight.T``: (..., inputs) and (outputs, inputs) -> (..., outputs)."""
    if _fits(x.size * len(weight), x, weight):
        return _by_numpy(_numpy_matmul, _matmul, x, weight)
    return _matmul(x, weight)


class Linear(nn.Linear):
    """MLX's linear layer, by `matmul` where NumPy does it."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) -> (..., outputs)."""
        if not _fits(x.size * len(self.weight), x, self.weight):
            return super().__call__(x)
        x = matmul(x, self.weight)
        return x + self.bias if "bias" in self else x


class Embedding(nn.Embedding):
    """An embedding whose use as the head is a `matmul`."""

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., D) -> logits (..., V)."""
        return matmul(x, self.weight)


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask = None
) -> mx.array:
    """Scaled dot-product attention.

    Args:
        queries (mx.array): (B, H, L, D).
        keys (mx.array): (B, heads, T, D); each of their heads serves H / heads of the queries'.
        values (mx.array): As the keys.
        scale (float): What scores are multiplied with.
        mask (optional): ``"causal"`` for the last L of T positions, or what may be seen, bool
            (B or 1, 1, L, T).

    Returns:
        mx.array: (B, H, L, D).
    """
    mlx = partial(mx.fast.scaled_dot_product_attention, scale=scale, mask=mask)
    if _fits(queries.size * keys.shape[2], queries, keys, values):
        numpy = partial(_numpy_attention, scale=scale, mask=mask)
        return _by_numpy(numpy, mlx, queries, keys, values)
    return mlx(queries, keys, values)


def attention_of_rows(
    queries: mx.array,
    keys: Sequence[mx.array],
    values: Sequence[mx.array],
    *,
    scale: float,
    masks: Sequence[Mask],
) -> mx.array:
    """`attention` of rows with keys of different lengths.

    Args:
        queries (mx.array): (B, H, L, D).
        keys (list of mx.array): Of each row, (1, heads, T, D).
        values (list of mx.array): As the keys.
        scale (float): What scores are multiplied with.
        masks (list): Of each row, as in `attention`.

    Returns:
        mx.array: (B, H, L, D).
    """
    B = len(keys)

    def by_row(attend: Callable[..., Any], arrays: Sequence[Any]) -> list[Any]:
        queries, keys, values = arrays[0], arrays[1 : B + 1], arrays[B + 1 :]
        return [
            attend(queries[i : i + 1], keys[i], values[i], scale=scale, mask=masks[i])
            for i in range(B)
        ]

    def mlx(*arrays: mx.array) -> mx.array:
        return mx.concatenate(by_row(mx.fast.scaled_dot_product_attention, arrays))

    def numpy(*arrays: Array) -> Array:
        return np.concatenate(by_row(_numpy_attention, arrays))

    if _fits(queries.size * sum(row.shape[2] for row in keys), queries, *keys, *values):
        return _by_numpy(numpy, mlx, queries, *keys, *values)
    return mlx(queries, *keys, *values)


def _numpy_attention(
    queries: Array, keys: Array, values: Array, *, scale: float, mask: Mask
) -> Array:
    """Attention in blocks of heads and queries; no score that the causal mask hides is taken."""
    B, H, L, D = queries.shape
    heads, T = keys.shape[1:3]
    group = H // heads
    together = max(1, BLOCK // (L * T * group))
    step = max(16, BLOCK // (T * group))
    output = np.empty((B, L, H, D), np.float32)  # as the layer after it reads it
    causal = isinstance(mask, str)
    later = ~np.tri(min(step, L), dtype=bool)
    allowed = np.array(mask, copy=False) if isinstance(mask, mx.array) else None
    for row, head, start in product(range(B), range(0, heads, together), range(0, L, step)):
        block = slice(start, min(start + step, L))
        rows, seen = block.stop - start, T - L + block.stop if causal else T
        own, mine = slice(head, head + together), slice(head * group, (head + together) * group)
        scaled = (queries[row, mine, block] * scale).reshape(-1, group * rows, D)
        scores = scaled @ keys[row, own, :seen].swapaxes(1, 2)
        by_query = scores.reshape(-1, rows, seen)
        if causal:
            np.copyto(by_query[..., seen - rows :], -np.inf, where=later[:rows, :rows])
        elif allowed is not None:
            hidden = ~allowed[min(row, len(allowed) - 1), 0, block]
            np.copyto(by_query, -np.inf, where=hidden)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed = (scores @ values[row, own, :seen]) / scores.sum(axis=-1, keepdims=True)
        output[row, block, mine] = mixed.reshape(-1, rows, D).swapaxes(0, 1)
    return output.swapaxes(1, 2)


def _in_blocks(function: Callable[..., None], *arrays: Array) -> Array:
    """An elementwise ``function(output, *arrays)``, on as much at a time as a cache holds."""
    output = np.empty(arrays[0].shape, np.float32)
    flat = [array.reshape(-1) for array in (output, *arrays)]
    for start in range(0, output.size, BLOCK // 4):
        function(*(array[start : start + BLOCK // 4] for array in flat))
    return output


def _gate(output: Array, x: Array, slope: float) -> None:
    """x sigmoid(slope x)."""
    np.multiply(x, np.float32(-slope), out=output)
    with np.errstate(over="ignore"):  # x / inf is the right 0
        np.exp(output, out=output)
    output += 1
    np.divide(x, output, out=output)


def quick_gelu(x: mx.array) -> mx.array:
    """x sigmoid(1.702 x), OpenAI CLIP's activation."""
    if _fits(EXP * x.size, x):
        numpy = partial(_in_blocks, partial(_gate, slope=1.702))
        return _by_numpy(numpy, nn.gelu_fast_approx, x)
    return nn.gelu_fast_approx(x)


def _numpy_swiglu(output: Array, gate: Array, up: Array) -> None:
    _gate(output, gate, slope=1)
    output *= up


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """SiLU(gate) up (Shazeer 2020, arXiv:2002.05202)."""
    if _fits(EXP * gate.size, gate, up):
        return _by_numpy(partial(_in_blocks, _numpy_swiglu), _swiglu, gate, up)
    return _swiglu(gate, up)
