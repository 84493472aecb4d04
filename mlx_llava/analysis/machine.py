"""What this machine is, and how fast it is when measured."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llava.model.blas import BLAS
from mlx_llava.model.device import available_memory, on_cpu, total_memory
from mlx_llava.model.linux_cpu import NUMPY, matmul

_GB = 1e9


def _median_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    function()  # warms up
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def matmul_rate(dtype: mx.Dtype, rows: int = 600, width: int = 2048, hidden: int = 5632) -> float:
    """GFLOP/s of one matmul as a prefill has it, by `linux_cpu.matmul`."""
    x = mx.random.normal((rows, width)).astype(dtype)
    weight = mx.random.normal((hidden, width)).astype(dtype)
    mx.eval(x, weight)
    return 2 * rows * width * hidden / _median_seconds(lambda: mx.eval(matmul(x, weight))) / 1e9


def read_rate(size: int = 400_000_000) -> float:
    """GB/s at which all cores, or the GPU, read memory that no cache holds."""
    if not on_cpu():
        array = mx.ones((size // 4,))
        mx.eval(array)
        return size / _median_seconds(lambda: mx.eval(array.sum())) / _GB
    parts = np.array_split(np.ones(size // 4, np.float32), os.cpu_count() or 1)
    with ThreadPoolExecutor(len(parts)) as pool:
        seconds = _median_seconds(lambda: list(pool.map(lambda x: np.dot(x, x), parts)), 9)
    return size / seconds / _GB


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
            "MLX uses its own slow BLAS for training: pip install 'mlx-llava[cpu]' (x86-64), or "
            "your system's OpenBLAS (apt install libopenblas0-pthread)."
        ]
    return []
