"""Products of many rows with codes as they are stored, compiled by numba.

A few rows of a weight at a time become float32 in a core's first cache, and are multiplied there
with all rows of inputs, which lie packed in its second: BLAS would want the weight in memory as
float32, and pack it itself.

R rows, I inputs, N outputs, W words of codes of each, G groups.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import binding

from mlx_llava.model.linux import vectors
from mlx_llava.model.linux.kernels import Floats, Function, Words, aligned, compiled
from mlx_llava.model.linux.vectors import HEIGHT, LANES

_float, _word, _int = np.float32, np.uint32, np.int32
#: Whether a vector is one register, without which BLAS is faster.
WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
#: Of how many inputs products are added up in registers.
DEPTH = 256
#: How many rows of inputs are multiplied together, and with how many of a weight.
PANEL, TOGETHER = 3 * LANES, 128


@compiled
def pack(x: Floats, count: int, start: int, stop: int, columns: Floats) -> None:
    """Writes inputs (R, I) as products take them, flat: first, (count + first)-th, ... of each.

    Block by block of DEPTH inputs, from start to stop; in it panel by panel, (depth, PANEL) but
    for the last.
    """
    R, I = x.shape  # noqa: E741 - inputs
    wide, few = -(-R // LANES) * LANES, np.empty((LANES, DEPTH + LANES), np.float32)
    for first in range(start * DEPTH, min(stop * DEPTH, I), DEPTH):
        depth = min(DEPTH, I - first)
        words = depth // count
        for row in range(0, wide, LANES):
            panel = row // PANEL * PANEL
            width, rows = min(PANEL, wide - panel), min(LANES, R - row)
            for r in range(rows):
                for i in range(depth):
                    few[r, i] = x[row + r, first + i]
            few[rows:] = 0
            for k in range(count):
                for j in range(words):
                    at = first * wide + panel * depth + (k * words + j) * width + row - panel
                    for r in range(LANES):
                        columns[at + r] = few[r, j * count + k]


@cache
def product(bits: int, units: int) -> Function:
    """Products for codes of which a word holds a whole number, with so many words in a group.

    Of codes (N, W), scales and biases (N, G), float32, and what `pack` wrote; to outputs (R, N).
    """
    count, mask = 32 // bits, _word((1 << bits) - 1)

    def multiply(
        codes: Words, scales: Floats, biases: Floats, columns: Floats, outputs: Floats
    ) -> None:
        (R, N), W = outputs.shape, codes.shape[1]
        wide = -(-R // LANES) * LANES
        last = wide // PANEL * PANEL
        sums, block = aligned(TOGETHER * wide), aligned(HEIGHT * DEPTH)
        flat = codes.reshape(-1)
        factors, shifts = scales.reshape(-1), biases.reshape(-1)
        for start in range(0, N, TOGETHER):
            stop = min(start + TOGETHER, N)
            sums[:] = 0
            for word in range(0, W, DEPTH // count):
                words = min(DEPTH // count, W - word)
                depth = words * count
                for top in range(start, stop, HEIGHT):
                    for n in range(top, min(top + HEIGHT, stop)):
                        first, at = n * W + word, (n - top) * depth
                        vectors.prefetch(flat, first + TOGETHER * W)
                        for j in range(0, words // LANES * LANES, LANES):
                            own, group = vectors.load(flat, first + j), (first + j) // units
                            scale = vectors.load_repeated(factors, group, units)
                            bias = vectors.load_repeated(shifts, group, units)
                            for k in range(count):
                                numbers = vectors.codes(own, k, bits)
                                numbers = vectors.multiply_add(numbers, scale, bias)
                                vectors.store(block, at + k * words + j, numbers)
                        for j in range(words // LANES * LANES, words):
                            group = (first + j) // units
                            for k in range(count):
                                code = _float(_int((flat[first + j] >> _word(bits * k)) & mask))
                                number = factors[group] * code + shifts[group]
                                block[at + k * words + j] = number
                    s, c = (top - start) * wide, word * count * wide
                    for p in range(0, last, PANEL):
                        panel = c + p * depth
                        vectors.add_products(sums, s + p, wide, block, columns, panel, depth, 3)
                    s, c = s + last, c + last * depth
                    if wide - last == 2 * LANES:
                        vectors.add_products(sums, s, wide, block, columns, c, depth, 2)
                    elif wide > last:
                        vectors.add_products(sums, s, wide, block, columns, c, depth, 1)
            for r in range(R):
                for n in range(start, stop):
                    outputs[r, n] = sums[(n - start) * wide + r]

    # A name is a file: of one for all, two processes could leave each other's code in it.
    multiply.__qualname__ = f"product_of_{bits}_bits_{units}_words"
    return compiled(multiply)
