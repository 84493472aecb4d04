"""What this machine is and can do: its memory, its device, and how fast it is when measured."""

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
from mlx_llava.model.linux_cpu import NUMPY, matmul

_GB = 1e9


def on_cpu() -> bool:
    """Whether MLX computes on a CPU."""
    return mx.default_device() == mx.cpu


def fast_dtype() -> str:
    """What the device computes fast in; of a CPU's matmuls only float32's has a BLAS."""
    return "float32" if on_cpu() else "bfloat16"


def total_memory() -> int:
    """The memory that models can use, in bytes: what Metal recommends, or the machine's."""
    if on_cpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info["memory_size"])


def available_memory() -> int:
    """What of that is free now, in bytes."""
    meminfo = Path("/proc/meminfo")
    if not on_cpu() or not meminfo.exists():
        return max(0, total_memory() - mx.get_active_memory())
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def check_weights(nbytes: int) -> None:
    """Raises ValueError where a model's weights cannot fit."""
    total = total_memory()
    if nbytes > total:
        raise ValueError(
            f"The weights take {nbytes / _GB:.1f} GB and this machine has {total / _GB:.1f} GB; "
            "convert the model with -q first, or choose a smaller one."
        )


def configure_device() -> None:
    """Lets Metal keep all weights resident, and bounds what MLX keeps of freed memory."""
    if mx.metal.is_available():
        limit = total_memory()
        mx.set_wired_limit(limit)
        mx.set_cache_limit(limit // 8)


def seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """The median time of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def matmul_rate(dtype: mx.Dtype, rows: int = 600, width: int = 2048, hidden: int = 5632) -> float:
    """GFLOP/s of one matmul as a prefill has it, by `kernels.matmul`."""
    x = mx.random.normal((rows, width)).astype(dtype)
    weight = mx.random.normal((hidden, width)).astype(dtype)
    mx.eval(x, weight)
    return 2 * rows * width * hidden / seconds(lambda: mx.eval(matmul(x, weight))) / 1e9


def read_rate(size: int = 400_000_000) -> float:
    """GB/s at which all cores, or the GPU, read memory that no cache holds."""
    if not on_cpu():
        array = mx.ones((size // 4,))
        mx.eval(array)
        return size / seconds(lambda: mx.eval(array.sum())) / _GB
    parts = np.array_split(np.ones(size // 4, np.float32), os.cpu_count() or 1)
    with ThreadPoolExecutor(len(parts)) as pool:
        return size / seconds(lambda: list(pool.map(lambda x: np.dot(x, x), parts)), 9) / _GB


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of installed packages."""
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
        "versions": versions("mlx", "mlx-lm", "numpy"),
    }


def advice() -> list[str]:
    """What to install, if anything."""
    if sys.platform == "linux" and on_cpu() and BLAS is None:
        return [
            "MLX uses its own slow BLAS for training: pip install 'mlx-llava[cpu]' (x86-64), or "
            "your system's OpenBLAS (apt install libopenblas0-pthread)."
        ]
    return []
