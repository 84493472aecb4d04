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
from collections.abc import Callable
from functools import partial
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
    """The values of an array, which are waited for and not copied."""
    return np.array(array, copy=False)


def _by_numpy(numpy: Callable[..., Array], mlx: Function, *arrays: mx.array) -> mx.array:
    """Calls a function of NumPy arrays in the place of MLX's, whose gradient it has."""

    @mx.custom_function
    def function(*arrays: mx.array) -> mx.array:
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
    return (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1)


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """``x @ weight.T``: (..., inputs) and (outputs, inputs) -> (..., outputs)."""
    if _fits(x.size * len(weight), x, weight):
        return _by_numpy(_numpy_matmul, _matmul, x, weight)
    return _matmul(x, weight)


class Linear(nn.Linear):
    """A linear layer by `matmul`."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) -> (..., outputs)."""
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


def _numpy_attention(
    queries: Array, keys: Array, values: Array, *, scale: float, mask: Mask
) -> Array:
    """Attention in blocks of queries, which under the causal mask see no key that is hidden."""
    B, H, L, D = queries.shape
    heads, T = keys.shape[1:3]
    group = H // heads
    step = max(16, BLOCK // (T * group))
    output = np.empty((B, L, H, D), np.float32)  # as the layer after it reads it
    causal = isinstance(mask, str)
    later = ~np.tri(step, dtype=bool)
    allowed = np.array(mask, copy=False) if isinstance(mask, mx.array) else None
    for row in range(B):
        for head in range(heads):
            mine = slice(head * group, (head + 1) * group)
            for start in range(0, L, step):
                block = slice(start, min(start + step, L))
                rows, seen = block.stop - start, T - L + block.stop if causal else T
                scores = (queries[row, mine, block] * scale).reshape(-1, D) @ keys[
                    row, head, :seen
                ].T
                scores = scores.reshape(group, rows, seen)
                if causal:
                    np.copyto(scores[..., seen - rows :], -np.inf, where=later[:rows, :rows])
                elif allowed is not None:
                    hidden = ~allowed[min(row, len(allowed) - 1), 0, block]
                    np.copyto(scores, -np.inf, where=hidden)
                scores -= scores.max(axis=-1, keepdims=True)
                np.exp(scores, out=scores)
                mixed = scores.reshape(-1, seen) @ values[row, head, :seen]
                mixed = mixed.reshape(group, -1, D) / scores.sum(axis=-1, keepdims=True)
                output[row, block, mine] = mixed.swapaxes(0, 1)
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
    if _fits(x.size, x):
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
    if _fits(gate.size, gate, up):
        return _by_numpy(partial(_in_blocks, _numpy_swiglu), _swiglu, gate, up)
    return _swiglu(gate, up)
