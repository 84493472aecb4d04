"""What this machine is, and how fast it is when measured."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from mlx_llava.analysis.random_model import random_array
from mlx_llava.checkpoint.precision import arrays_of
from mlx_llava.model.blas import BLAS
from mlx_llava.model.device import available_memory, on_cpu, total_memory
from mlx_llava.model.linux.adopt import adopt
from mlx_llava.model.linux.functions import NUMPY
from mlx_llava.model.linux.layers import is_read_fast
from mlx_llava.model.quantized import float_dtype, is_quantized, plain_weight

_GB = 1e9
#: More bytes than any cache holds.
_BEYOND_CACHES = 300_000_000
#: So many weights hide that a layer has to be launched.
_LEAST = 1 << 22


def clock(function: Callable[..., object], *args: object) -> float:
    """The seconds that a call takes."""
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def _seconds(function: Callable[[], object], repeats: int) -> float:
    """The least time that something takes, of several tries unless these take long."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1:
        times.append(clock(function))
    return min(times)


def matmul_rate(dtype: mx.Dtype) -> float:
    """GFLOP/s of one matmul as a prefill has it."""
    layer = nn.Linear(2048, 5632, bias=False)
    layer.set_dtype(dtype)
    return layer_rate(layer, 600) / _GB


def read_rate(size: int = 400_000_000) -> float:
    """GB/s at which all cores, or the GPU, read memory that no cache holds."""
    if not on_cpu():
        array = mx.ones((size // 4,))
        mx.eval(array)
        return size / _seconds(lambda: mx.eval(array.sum()), 9) / _GB
    parts = np.array_split(np.ones(size // 4, np.float32), os.cpu_count() or 1)
    with ThreadPoolExecutor(len(parts)) as pool:
        seconds = _seconds(lambda: list(pool.map(lambda x: np.dot(x, x), parts)), 9)
    return size / seconds / _GB


def layer_rate(layer: nn.Module, rows: int) -> float:
    """Operations a second with so many rows, or with as many as take two seconds."""
    twin = _with_random_weights(layer)
    rows = max(1, min(rows, int(2 / _in_turn([twin], 1))))
    return 2 * rows * plain_weight(twin).size / _in_turn([twin], rows)


def layer_read_rate(layer: nn.Module) -> float:
    """Bytes a second with one row, of layers that follow each other as in a model."""
    twins = [_with_random_weights(layer)]
    size = sum(array.nbytes for array in arrays_of(twins[0]))
    if _in_turn(twins, 1) < 0.1:  # else no cache matters
        twins += [_with_random_weights(layer) for _ in range(_BEYOND_CACHES // size)]
    return len(twins) * size / _in_turn(twins, 1)


def _with_random_weights(layer: nn.Module) -> nn.Module:
    """A linear layer like another, as `load` would give it, and no smaller than `_LEAST`."""
    outputs, inputs = plain_weight(layer).shape  # which computes nothing
    twin: nn.Module = nn.Linear(inputs, max(outputs, _LEAST // inputs), bias="bias" in layer)
    bits = layer.bits if is_quantized(layer) else None
    if bits is not None:
        twin = twin.to_quantized(layer.group_size, bits, layer.mode)
    draw = partial(random_array, 0, dtype=float_dtype(layer, mx.float32), bits=bits)
    twin.update(tree_map_with_path(draw, twin.parameters()))
    adopt(twin)
    mx.eval(twin.parameters())
    return twin


def _in_turn(layers: list[nn.Module], rows: int) -> float:
    """The seconds that some layers take one after the other."""
    layer = layers[0]
    x = mx.random.normal((1, rows, plain_weight(layer).shape[1]))
    if not is_read_fast(layer):  # else inputs are float32
        x = x.astype(float_dtype(layer, mx.float32))
    mx.eval(x)
    return _seconds(lambda: mx.eval([layer(x) for layer in layers]), 5)


def _versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """The machine in words and numbers; nothing is measured."""
    info = mx.device_info()
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{mx.default_device().type.name}: {info.get('device_name', 'unknown')}",
        "cores": os.cpu_count(),
        "memory_gb": round(total_memory() / _GB, 1),
        "available_gb": round(available_memory() / _GB, 1),
        "blas_below_mlx": Path(BLAS).name if BLAS else None,
        "numpy_blas": f"{blas['name']} {blas['version']}" if NUMPY else None,
        "versions": _versions("mlx", "mlx-lm", "numpy"),
    }


def advice() -> list[str]:
    """What to install, if anything."""
    if sys.platform == "linux" and on_cpu() and BLAS is None:
        return [
            "MLX uses its own slow BLAS for training: pip install 'mlx-llava[train]' (x86-64), or "
            "your system's OpenBLAS (apt install libopenblas0-pthread)."
        ]
    return []
