"""What Linux's CPU needs to be fast: layers and functions that `adopt` puts into a loaded model.

MLX's CPU backend on Linux takes exp one number at a time, and its matmul of one row reads weights
at half the speed of memory; NumPy, which is vectorised and whose wheels bring an OpenBLAS, does
what is large and in float32. Gradients stay MLX's, and so does all that `mx.compile` traces, which
has no values to give to NumPy. On a GPU, adopted layers do what they did before.

B rows, H heads, L queries, T keys, D head width.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any, TypeAlias, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_llava.model import clip, layers
from mlx_llava.model.blas import set_blas_threads
from mlx_llava.model.layers import Mask

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Function: TypeAlias = "Callable[..., mx.array]"

#: Below this many multiplications, going to NumPy and back (about 20 us) does not pay.
SMALLEST = 1 << 17
#: How many numbers are worked on at a time, so that they stay in a core's cache (1 MB).
BLOCK = 1 << 18
#: An exp of MLX's takes as long as so many multiplications.
EXP = 32
#: Up to so many rows, products of a matrix and a vector are faster than one of matrices.
FEW = 4
#: Whether this file does anything. Read at every call: False makes all operations MLX's own.
NUMPY = sys.platform == "linux" and os.environ.get("MLX_LLAVA_BLAS") != "off"


def adopt(model: nn.Module) -> None:
    """Swaps a model's layers, and the functions that they hold, for the ones of this file.

    Does nothing on other systems, or where ``MLX_LLAVA_BLAS=off`` is set.
    """
    if not NUMPY:
        return
    _settle_process()
    for module in model.modules():
        module.__class__ = _LAYERS.get(type(module), type(module))
        for name, value in list(vars(module).items()):
            if callable(value) and value in _FUNCTIONS:
                setattr(module, name, _FUNCTIONS[value])


@cache
def _settle_process() -> None:
    """One thread below MLX, as NumPy does what is large; and one arena that keeps freed memory.

    MLX's CPU backend frees what each operation made; given back to the system, the same pages
    would be asked for, and zeroed, again and again (mallopt(3)).
    """
    set_blas_threads(1)
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(arena_max, 1)
        mallopt(trim_threshold, 256 << 20)
        mallopt(mmap_threshold, 32 << 20)


def _fits(work: int, *arrays: mx.array) -> bool:
    """Whether NumPy should do some work: on this device, on these arrays."""
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


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """``x @ weight.T``: (..., inputs) and (outputs, inputs) -> (..., outputs)."""
    if _fits(x.size * len(weight), x, weight):
        return _by_numpy(_numpy_matmul, lambda x, weight: x @ weight.T, x, weight)
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


class Linear(nn.Linear):
    """MLX's linear layer by `matmul`."""

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


class PatchEmbedding(clip.PatchEmbedding):
    """CLIP's by `matmul`."""

    def project(self, patches: mx.array) -> mx.array:
        """(B, P, side side 3) -> (B, P, D)."""
        return matmul(patches, self.weight.flatten(1))


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask = None
) -> mx.array:
    """As mx.fast.scaled_dot_product_attention: (B, H, L, D), keys and values (B, heads, T, D)."""
    mlx = partial(mx.fast.scaled_dot_product_attention, scale=scale, mask=mask)
    if _fits(queries.size * keys.shape[2], queries, keys, values):
        return _by_numpy(partial(_numpy_attention, scale, mask), mlx, queries, keys, values)
    return mlx(queries, keys, values)


def _numpy_attention(scale: float, mask: Mask, queries: Array, keys: Array, values: Array) -> Array:
    B, H, L, D = queries.shape
    output = np.empty((B, L, H, D), np.float32)  # as the layer after it reads it
    hidden = [~row[0] for row in _view(mask)] if isinstance(mask, mx.array) else [None]
    for i in range(B):
        own = hidden[min(i, len(hidden) - 1)]
        _attend(output[i], queries[i] * scale, keys[i], values[i], own, isinstance(mask, str))
    return output.swapaxes(1, 2)


def _attend(
    output: Array, queries: Array, keys: Array, values: Array, hidden: Array | None, causal: bool
) -> None:
    """One row's attention, (L, H, D), in blocks of heads and queries.

    No score that the causal mask hides is taken.
    """
    (H, L, D), (heads, T, _) = queries.shape, keys.shape
    group = H // heads
    together = max(1, BLOCK // (L * T * group))
    step = max(16, BLOCK // (T * group))
    later = ~np.tri(min(step, L), dtype=bool)
    for head, start in product(range(0, heads, together), range(0, L, step)):
        block = slice(start, min(start + step, L))
        rows, seen = block.stop - start, T - L + block.stop if causal else T
        own, mine = slice(head, head + together), slice(head * group, (head + together) * group)
        scores = queries[mine, block].reshape(-1, group * rows, D)
        scores = scores @ keys[own, :seen].swapaxes(1, 2)
        by_query = scores.reshape(-1, rows, seen)
        if causal:
            np.copyto(by_query[..., seen - rows :], -np.inf, where=later[:rows, :rows])
        elif hidden is not None:
            np.copyto(by_query, -np.inf, where=hidden[block])
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed = (scores @ values[own, :seen]) / scores.sum(axis=-1, keepdims=True)
        output[block, mine] = mixed.reshape(-1, rows, D).swapaxes(0, 1)


def quick_gelu(x: mx.array) -> mx.array:
    """As `layers.quick_gelu`."""
    return _gated(layers.quick_gelu, 1.702, x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """As `layers.swiglu`."""
    return _gated(layers.swiglu, 1, gate, up)


def _gated(mlx: Function, slope: float, *arrays: mx.array) -> mx.array:
    if _fits(EXP * arrays[0].size, *arrays):
        return _by_numpy(partial(_numpy_gated, slope), mlx, *arrays)
    return mlx(*arrays)


def _numpy_gated(slope: float, *arrays: Array) -> Array:
    """x sigmoid(slope x), times another array if there is one; in blocks."""
    outputs = np.empty(arrays[0].shape, np.float32)
    flat = [array.reshape(-1) for array in (outputs, *arrays)]
    for start in range(0, outputs.size, BLOCK // 4):
        output, x, *factors = (array[start : start + BLOCK // 4] for array in flat)
        np.multiply(x, np.float32(-slope), out=output)
        with np.errstate(over="ignore"):  # x / inf is the right 0
            np.exp(output, out=output)
        output += 1
        np.divide(x, output, out=output)
        for factor in factors:
            output *= factor
    return outputs


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    clip.PatchEmbedding: PatchEmbedding,
}
_FUNCTIONS: dict[Function, Function] = {
    mx.fast.scaled_dot_product_attention: attention,
    layers.quick_gelu: quick_gelu,
    layers.swiglu: swiglu,
}
