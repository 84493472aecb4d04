"""Products of rows with weights as they are stored, compiled by numba, which is optional.

They run in one thread, without the interpreter's lock. What is compiled is kept on disk, where
there is a folder to write to.

R rows, N outputs, W words of codes of each, G groups; U units of C codes, see `weights.UNITS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pickle import UnpicklingError
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import overload

from mlx_llava.model.linux import vectors
from mlx_llava.model.linux.vectors import LANES

Function: TypeAlias = Callable[..., Any]
Floats: TypeAlias = npt.NDArray[np.float32]
Words: TypeAlias = npt.NDArray[np.uint32]
Halves: TypeAlias = npt.NDArray[np.uint16]
FAST = {"contract", "reassoc", "nsz", "arcp"}  # no promise that there is no NaN
_float, _word, _int = np.float32, np.uint32, np.int32
#: Of what bits a word holds a whole number of codes.
WHOLE = (2, 4, 8)
#: So many words ahead, codes are asked for: memory answers after some hundred steps.
AHEAD = 2048


jit = partial(njit, nogil=True, fastmath=FAST, error_model="numpy")


def compiled(function: Function) -> Function:
    """A function compiled by numba, kept on disk where that can be."""
    try:
        compiled = jit(cache=True)(function)
    except RuntimeError:  # no folder for the cache can be written
        return cast("Function", jit(function))

    def call(*arguments: Any) -> None:
        nonlocal compiled
        try:
            compiled(*arguments)
        except (OSError, EOFError, UnpicklingError):  # a full disk, or a file that was cut off
            compiled = jit(function)
            compiled(*arguments)

    return call


@jit
def _float16(half: np.uint16) -> np.float32:
    """A finite float16, given as uint16, as float32.

    Its bits at their places in a float32 are a number 2 ** 112 times smaller.
    """
    bits = _word(half)
    word = (bits & _word(0x8000)) << _word(16) | (bits & _word(0x7FFF)) << _word(13)
    return _word(word).view(np.float32) * _float(2.0**112)


@jit
def _bfloat16(half: np.uint16) -> np.float32:
    return _word(_word(half) << _word(16)).view(np.float32)


def number(value: Any, is_bfloat16: bool) -> Any:
    """A float32, or the number of 16 bits that a uint16 is, as float32."""


@overload(number, strict=False)  # type: ignore[untyped-decorator]
def _overloaded_number(value: types.Number, is_bfloat16: bool) -> Function:  # noqa: ARG001
    if isinstance(value, types.Float):
        return lambda value, is_bfloat16: value  # noqa: ARG005
    return lambda value, is_bfloat16: _bfloat16(value) if is_bfloat16 else _float16(value)


@jit
def aligned(size: int) -> Floats:
    """Memory from where a line of the cache begins: of a vector in two lines both are read."""
    memory = np.empty(size + LANES, np.float32)
    start = np.uint64(-np.int64(memory.ctypes.data) & 63) // np.uint64(4)
    return memory[start : start + size]


@jit
def _in_blocks(x: Floats, blocks: int) -> Floats:
    """Inputs (R, C, U) in the order in which blocks of words take them, (R, blocks C LANES)."""
    R, C, _ = x.shape
    ordered = aligned(R * blocks * C * LANES).reshape(R, -1)
    for r in range(R):
        for i in range(blocks):
            for k in range(C):
                for j in range(LANES):
                    ordered[r, (i * C + k) * LANES + j] = x[r, k, i * LANES + j]
    return ordered


@jit
def _sums(x: Floats, units: int) -> Floats:
    """Of inputs (R, C, U), those of each group, (R, G)."""
    sums = np.zeros((len(x), x.shape[2] // units), np.float32)
    for r in range(len(x)):
        for k in range(x.shape[1]):
            for g in range(sums.shape[1]):
                for u in range(g * units, (g + 1) * units):
                    sums[r, g] += x[r, k, u]
    return sums


@cache
def dot_words(bits: int, units: int) -> Function:
    """Products for codes of which a word holds a whole number, with so many words in a group.

    Of codes (N, W), scales and biases (N, G), float32 or 16 bits as uint16, and inputs
    (R, C, U); to outputs (R, N).
    """
    count, mask = 32 // bits, _word((1 << bits) - 1)

    def dot(
        codes: Words, scales: Any, biases: Any, is_bfloat16: bool, x: Floats, outputs: Floats
    ) -> None:
        G, W, blocks = scales.shape[1], codes.shape[1], codes.shape[1] // LANES
        ordered, sums, flat = _in_blocks(x, blocks), _sums(x, units), codes.reshape(-1)
        factors, shifts = np.empty(G, np.float32), np.empty(G, np.float32)
        for n in range(len(codes)):
            for g in range(G):
                factors[g] = number(scales[n, g], is_bfloat16)
                shifts[g] = number(biases[n, g], is_bfloat16)
            for r in range(len(x)):
                total, lanes = _float(0), vectors.zeros()
                for g in range(G):
                    total += shifts[g] * sums[r, g]
                for i in range(blocks):
                    first = n * W + i * LANES
                    if r == 0:
                        vectors.prefetch(flat, first + AHEAD)
                    words, part = vectors.load(flat, first), vectors.zeros()
                    for k in range(count):
                        own = vectors.load(ordered[r], (i * count + k) * LANES)
                        part = vectors.multiply_add(vectors.codes(words, k, bits), own, part)
                    scale = vectors.load_repeated(factors, i * LANES // units, units)
                    lanes = vectors.multiply_add(scale, part, lanes)
                for j in range(blocks * LANES, W):
                    for k in range(count):
                        code = _float(_int((codes[n, j] >> _word(bits * k)) & mask))
                        total += factors[j // units] * code * x[r, k, j]
                outputs[r, n] = total + vectors.total(lanes)

    # A name is a file: of one for all, two processes could leave each other's code in it.
    dot.__qualname__ = f"dot_{bits}_bits_{units}_words"
    return compiled(dot)


@compiled
def unpack(codes: Words, scales: Floats, biases: Floats, bits: int, C: int, block: Floats) -> None:
    """Numbers (N, C U) of codes of any bits, each row's code k of unit j at k U + j."""
    U = block.shape[1] // C
    words, units = codes.shape[1] // U, U // scales.shape[1]
    mask = _word((1 << bits) - 1)
    spread, shifts = np.empty(U, _float), np.empty(U, _float)
    planes = np.empty((words, U), np.uint32)
    for n in range(len(codes)):
        for m in range(words):
            for j in range(U):
                planes[m, j] = codes[n, j * words + m]
        for g in range(scales.shape[1]):
            for u in range(units):
                spread[g * units + u], shifts[g * units + u] = scales[n, g], biases[n, g]
        for k in range(C):
            low, shift = planes[k * bits >> 5], _word(k * bits & 31)
            output = block[n, k * U : (k + 1) * U]
            if shift + bits <= 32:
                for j in range(U):
                    code = (low[j] >> shift) & mask
                    output[j] = spread[j] * _float(_int(code)) + shifts[j]
            else:
                high, rest = planes[(k * bits >> 5) + 1], _word(32 - shift)
                for j in range(U):
                    code = ((low[j] >> shift) | (high[j] << rest)) & mask
                    output[j] = spread[j] * _float(_int(code)) + shifts[j]


@compiled
def dot_bfloat16(weight: Halves, x: Floats, output: Floats) -> None:
    """The product of bfloat16 as uint16 (N, I) and float32 (I,)."""
    for n in range(len(weight)):
        total = _float(0)
        for i in range(weight.shape[1]):
            total += _bfloat16(weight[n, i]) * x[i]
        output[n] = total


@compiled
def dot_float16(weight: Halves, x: Floats, output: Floats) -> None:
    """The product of float16 as uint16 (N, I) and float32 (I,)."""
    for n in range(len(weight)):
        total = _float(0)
        for i in range(weight.shape[1]):
            total += _float16(weight[n, i]) * x[i]
        output[n] = total


@compiled
def widen_float16(weight: Halves, block: Floats) -> None:
    """float16 as uint16 (N, I) -> float32 (N, I)."""
    for n in range(len(weight)):
        for i in range(weight.shape[1]):
            block[n, i] = _float16(weight[n, i])
