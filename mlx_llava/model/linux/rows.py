"""What a block does to each token between its products, on Linux's CPU: by all threads.

MLX's CPU backend has one thread, and writes whole arrays to memory between two operations.

B rows, L tokens, D width, W head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_llava.model.linux import passes
from mlx_llava.model.linux.threads import EXP, MOVE, parallel
from mlx_llava.model.linux.weights import Array, kernels

#: How many numbers NumPy works on at a time, so that they stay in a core's cache.
BLOCK = 1 << 16
#: From so many multiplications on, compiled code is worth its import.
MANY = 1 << 22


@cache
def _compiled() -> ModuleType:
    from mlx_llava.model.linux import compiled_passes

    return compiled_passes


def of(size: int) -> ModuleType:
    """What has the functions of passes.py for work of so many multiplications."""
    return passes if size < MANY or kernels() is None else _compiled()


def _do(name: str, cost: int, arrays: Sequence[Array], *constants: Any) -> Array:
    """One of passes.py on arrays of as many rows; gives its output, shaped as the first."""
    size = cost * arrays[0].size
    module, outputs = of(size), np.empty(arrays[0].shape, np.float32)
    step = len(outputs)
    if module is passes:
        step = max(1, BLOCK * step // max(1, outputs.size))

    def part(start: int, stop: int) -> None:
        for first in range(start, stop, step):
            own = slice(first, min(first + step, stop))
            getattr(module, name)(outputs[own], *(array[own] for array in arrays), *constants)

    parallel(part, len(outputs), size)
    return outputs


def gated(slope: float, *arrays: Array, cubic: float = 0.0) -> Array:
    """x sigmoid(slope (x + cubic x^3)), times another array if there is one."""
    name = "gate" if len(arrays) == 1 else "gate_times"
    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    return _do(name, EXP, flat, slope, cubic).reshape(arrays[0].shape)


def gelu(x: Array) -> Array:
    """The exact GELU."""
    return _do("gelu", EXP, [np.ascontiguousarray(x).reshape(-1)]).reshape(x.shape)


def _by_rows(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1, array.shape[-1])


def rms_norm(norm: nn.RMSNorm, x: Array) -> Array:
    """RMSNorm, (..., D)."""
    outputs = _do("rms_norm", MOVE, [_by_rows(x)], np.asarray(norm.weight), norm.eps)
    return outputs.reshape(x.shape)


def layer_norm(norm: nn.LayerNorm, x: Array) -> Array:
    """LayerNorm, (..., D)."""
    weight, bias = np.asarray(norm.weight), np.asarray(norm.bias)
    return _do("layer_norm", MOVE, [_by_rows(x)], weight, bias, norm.eps).reshape(x.shape)


def plus(x: Array, y: Array) -> Array:
    """Their sum, (..., D)."""
    return _do("add", MOVE, [_by_rows(x), _by_rows(y)]).reshape(x.shape)


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """As `llama.Attention.rope`: (B, L, heads, W) by (B or 1, L, W / 2)."""
    heads, W = x.shape[2:]
    angles = (np.broadcast_to(own, (*x.shape[:2], W // 2)) for own in (cosine, sine))
    outputs = _do("rotate", MOVE, [x.reshape(-1, heads, W), *map(_by_rows, angles)])
    return outputs.reshape(x.shape)
