"""Where a model computes, in which numbers, and how much memory there is."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import mlx.core as mx

#: What weights are computed in.
DTYPES = ("float32", "float16", "bfloat16")
_GB = 1e9


def on_cpu() -> bool:
    """Whether MLX computes on a CPU."""
    return mx.default_device() == mx.cpu


def compiles() -> bool:
    """Whether compiling a training step pays, by `mx.compile`.

    On a CPU it does not: of g++ the kernels of one take longer than hundreds of steps, each runs in
    one thread, and what is traced has no values to give to NumPy.
    """
    return not on_cpu()


def fast_dtype() -> str:
    """What the device computes fast in; of a CPU's matmuls only float32's has a BLAS."""
    return "float32" if on_cpu() else "bfloat16"


def total_memory() -> int:
    """The memory that models can use, in bytes: Metal's advice, a card's, or the machine's."""
    if on_cpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = mx.device_info()
    on_metal = info.get("max_recommended_working_set_size") or info.get("memory_size")
    return int(on_metal or info["total_memory"])


def available_memory() -> int:
    """What of that is free now, in bytes; Metal does not tell what other processes use."""
    meminfo = Path("/proc/meminfo")
    if on_cpu() and meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    if (free := mx.device_info().get("free_memory")) is not None:  # CUDA
        return int(free) + mx.get_cache_memory()
    return max(0, total_memory() - mx.get_active_memory())


def memory_said() -> str:
    """How much memory there is for models, for people."""
    total = total_memory() / _GB
    if on_cpu():
        return f"this machine has {total:.1f} GB of memory"
    if (whole := mx.device_info().get("memory_size")) is None:  # CUDA
        return f"this graphics card has {total:.1f} GB of memory"
    machine = int(whole) / _GB
    return f"Metal recommends at most {total:.1f} GB of this machine's {machine:.0f} GB of memory"


def check_weights(nbytes: int, is_quantized: bool, other: str) -> None:
    """Raises ValueError where a model's weights cannot fit, with another that does."""
    if nbytes > total_memory():
        advice = "take" if is_quantized else "convert the model with -q first, or take"
        raise ValueError(
            f"The weights take {nbytes / _GB:.1f} GB and {memory_said()}; {advice} a smaller one, "
            f"such as {other}."
        )


def configure_device() -> None:
    """Lets Metal keep all weights resident, and bounds what MLX keeps of freed memory."""
    if mx.metal.is_available():
        limit = total_memory()
        mx.set_wired_limit(limit)
        mx.set_cache_limit(limit // 8)


def release_memory() -> None:
    """Gives back to the system what was freed, which MLX and the C library keep for reuse."""
    gc.collect()
    mx.clear_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc alone
        trim(0)
