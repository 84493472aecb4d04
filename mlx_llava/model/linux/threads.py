"""The threads that share what NumPy and compiled kernels do on Linux's CPU.

Each does whole parts of a product, its BLAS calls in itself: the threads of a BLAS go on spinning
after a call and would take the core from what comes next.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

#: Below this many multiplications, waking another thread (about 30 us) does not pay.
SMALLEST = 1 << 20
#: To read and write a number takes as long as so many multiplications, and an exp.
MOVE, EXP = 16, 32
#: How NumPy's BLAS is called: in its wheels of today, in older ones, and in a system's.
_PREFIXES = (("scipy_openblas", "64_"), ("openblas", "64_"), ("openblas", ""))


@cache
def threads() -> int:
    """How many threads there are: those that NumPy's BLAS had, which is left with one.

    One, where that BLAS is another and keeps its own.
    """
    library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # type: ignore[attr-defined]
    for prefix, suffix in _PREFIXES:
        if hasattr(library, f"{prefix}_set_num_threads{suffix}"):
            count = getattr(library, f"{prefix}_get_num_threads{suffix}")()
            getattr(library, f"{prefix}_set_num_threads{suffix}")(1)
            return max(1, count)
    return 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads() - 1, "mlx_llava")


def sharing(size: int) -> int:
    """How many threads should share work of so many multiplications."""
    return 1 if size < SMALLEST else threads()


def parallel(work: Callable[[int, int], None], length: int, size: int) -> None:
    """Calls ``work(start, stop)`` for the parts of a range, one a thread.

    Args:
        work (callable): Does a part.
        length (int): The end of the range.
        size (int): The multiplications of all parts.
    """
    count = min(sharing(size), length)
    if count == 1:
        work(0, length)
        return
    ends = [length * i // count for i in range(count + 1)]
    first, *rest = itertools.pairwise(ends)
    others = [_pool().submit(work, *part) for part in rest]
    work(*first)
    for other in others:
        other.result()
