"""The machine under MLX: on Linux, an optimised BLAS is put below MLX's CPU backend.

The CPU wheel of MLX for Linux links a reference BLAS that reaches 2-3 GFLOP/s. A library
that exports the same ``cblas_*`` names and is loaded globally *before* ``mlx.core`` takes
its place. macOS (Accelerate, Metal) and CUDA need nothing of this.

Set ``MLX_LLAVA_BLAS=off`` to leave MLX alone (also by linux/), or to the path of a
library to load that one.

And float32 is float32: on chips with matrix units (M5 and later, NVIDIA's), MLX would round what
it multiplies to TF32's 10 bits, an error of 7e-4, unless ``MLX_ENABLE_TF32`` says no before its
first matmul (MLX's usage/precision). Set it to 1 to have that, for speed.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from pathlib import Path


def _candidates() -> list[str]:
    """The libraries to try, best first: MKL from PyPI, then the system's BLIS, OpenBLAS."""
    mkl = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    system = [ctypes.util.find_library(name) for name in ("blis", "openblas")]
    return [str(path) for path in mkl] + [name for name in system if name]


def preload_blas() -> str | None:
    """Loads an optimised BLAS below MLX, if this is Linux and one is installed.

    Does nothing, silently, on other systems, when ``mlx.core`` is loaded already (too late
    to take effect) or when no library is found.

    Returns:
        The library that was loaded, or None.
    """
    choice = os.environ.get("MLX_LLAVA_BLAS", "")
    if sys.platform != "linux" or choice == "off" or "mlx.core" in sys.modules:
        return None
    for library in [choice] if choice else _candidates():
        try:
            blas = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(blas, "cblas_sgemm") and _address(ctypes.CDLL(None)) == _address(blas):
            return library
    return None


def _address(library: ctypes.CDLL) -> int | None:
    """Where a library, or for None the whole process, finds the matmul that MLX calls."""
    return ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value


def set_blas_threads(count: int) -> None:
    """Sets the threads of the library below MLX.

    One, unless a model is trained: in inference NumPy does what is large, and the threads of two
    libraries would wait for each other's cores.
    """
    if BLAS is None:
        return
    library = ctypes.CDLL(BLAS)
    for name in ("MKL_Set_Num_Threads", "openblas_set_num_threads", "bli_thread_set_num_threads"):
        if hasattr(library, name):
            getattr(library, name)(count)


os.environ.setdefault("MLX_ENABLE_TF32", "0")
#: The library below MLX, or None.
BLAS = preload_blas()
