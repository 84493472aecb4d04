"""Weights as a checkpoint stores them, multiplied by NumPy on Linux's CPU, exact to rounding.

Many rows of inputs: parts of the weight become float32 in a core's cache, for BLAS or, where numba
is installed and a vector is a register, for a kernel. Few rows are bound by memory: numba's kernels
read what is stored.

R rows, I inputs, N outputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from mlx_llava.model.linux.threads import MOVE, parallel

Array: TypeAlias = npt.NDArray[np.float32]
Halves: TypeAlias = npt.NDArray[np.uint16]

#: Up to so many rows, BLAS's products of a matrix and a vector are faster than one of matrices.
FEW = 4
#: Up to so many, BLAS is faster with the weight on the left.
SOME = 16
#: How many numbers of float32 are made for a few rows at a time.
PART = 1 << 18
#: Bits -> how many codes fill how many words.
UNITS = {2: (16, 1), 3: (32, 3), 4: (8, 1), 5: (32, 5), 6: (16, 3), 8: (4, 1)}


@cache
def kernels() -> Any:
    """linux/kernels.py, or None where there is no numba."""
    try:
        return import_module("mlx_llava.model.linux.kernels")
    except ImportError:
        return None


@cache
def columns() -> Any:
    """linux/columns.py, where there is numba."""
    return import_module("mlx_llava.model.linux.columns")


class Weight(Protocol):
    """A matrix (N, I) in whatever form, whose columns may have an order of their own."""

    @property
    def shape(self) -> tuple[int, int]:
        """N, I."""

    @property
    def few(self) -> int:
        """Up to how many rows `dot` is the fastest."""

    def order(self, x: Array) -> Array:
        """Inputs (R, I) in the order of the columns."""

    def restore(self, x: Array) -> Array:
        """What `order` has done, undone."""

    def block(self, start: int, stop: int) -> Array:
        """Some rows of the matrix as float32."""

    def dot(self, x: Array, outputs: Array, start: int, stop: int) -> None:
        """Products of ordered inputs with some rows, to the same columns of the outputs (R, N)."""


def _dot_blocks(weight: Weight, x: Array, outputs: Array, start: int, stop: int) -> None:
    """Row by row, each block of the weight for all rows while a cache holds it."""
    step = max(1, PART // weight.shape[1])
    for first in range(start, stop, step):
        last = min(first + step, stop)
        block = weight.block(first, last)
        for row, output in zip(x, outputs, strict=True):
            np.dot(block, row, out=output[first:last])


@dataclass(frozen=True)
class Plain:
    """float32, (N, I)."""

    values: Array

    few = FEW

    @property
    def shape(self) -> tuple[int, int]:
        """N, I."""
        return self.values.shape[0], self.values.shape[1]

    def order(self, x: Array) -> Array:
        """The inputs."""
        return x

    restore = order

    def block(self, start: int, stop: int) -> Array:
        """Not copied."""
        return self.values[start:stop]

    def dot(self, x: Array, outputs: Array, start: int, stop: int) -> None:
        """By BLAS, which reads one row's weight at the speed of memory."""
        if len(x) == 1:
            np.dot(self.values[start:stop], x[0], out=outputs[0, start:stop])
        else:
            _dot_blocks(self, x, outputs, start, stop)


def _widened(numbers: Array | Halves, is_bfloat16: bool) -> Array:
    """float32 as it is, or made of 16 bits."""
    if numbers.dtype == np.float32:
        return cast("Array", numbers)
    if not is_bfloat16 and kernels() is None:
        return numbers.view(np.float16).astype(np.float32)
    floats = np.empty(numbers.shape, np.float32)
    if is_bfloat16:
        np.left_shift(numbers, 16, out=floats.view(np.uint32), dtype=np.uint32)
    else:
        kernels().widen_float16(numbers, floats)
    return floats


@dataclass(frozen=True)
class Half:
    """float16 or bfloat16 as 16-bit words, (N, I)."""

    words: Halves
    is_bfloat16: bool

    few = FEW

    @property
    def shape(self) -> tuple[int, int]:
        """N, I."""
        return self.words.shape[0], self.words.shape[1]

    def order(self, x: Array) -> Array:
        """The inputs."""
        return x

    restore = order

    def block(self, start: int, stop: int) -> Array:
        """Every 16-bit number is one of float32's."""
        return _widened(self.words[start:stop], self.is_bfloat16)

    def dot(self, x: Array, outputs: Array, start: int, stop: int) -> None:
        """By a kernel, if there are any."""
        if kernels() is None:
            _dot_blocks(self, x, outputs, start, stop)
            return
        dot = kernels().dot_bfloat16 if self.is_bfloat16 else kernels().dot_float16
        for row, output in zip(x, outputs, strict=True):
            dot(self.words[start:stop], row, output[start:stop])


@dataclass(frozen=True)
class Affine:
    """MLX's codes: scale times code plus bias, for each group of inputs.

    The columns of a block are all first codes of a unit, then all second ones: so they are cut
    out of words side by side.

    Attributes:
        codes: uint32, (N, I bits / 32).
        scales: (N, G), float32 or 16 bits.
        biases: as the scales.
        bits: of a code.
        is_bfloat16: what 16 bits are, if not float16.
        permutation: which input comes at each position, if they are not in order.
    """

    codes: npt.NDArray[np.uint32]
    scales: Array | Halves
    biases: Array | Halves
    bits: int
    is_bfloat16: bool = False
    permutation: npt.NDArray[np.int32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N, I."""
        return len(self.codes), self.codes.shape[1] * 32 // self.bits

    @property
    def few(self) -> int:
        """The kernel reads a row's codes once, which stay in a cache for all rows of inputs."""
        return SOME if self._has_kernel() else FEW

    def _has_kernel(self) -> bool:
        return kernels() is not None and self.bits in kernels().WHOLE

    @property
    def is_read_by_columns(self) -> bool:
        """Whether `dot_columns` is the fastest for many rows."""
        return self._has_kernel() and columns().WIDE

    def order(self, x: Array) -> Array:
        """All first codes' inputs, then all second ones'."""
        if self.permutation is not None:
            x = x[:, self.permutation]
        in_units = x.reshape(len(x), -1, UNITS[self.bits][0])
        return in_units.swapaxes(1, 2).reshape(x.shape)

    def restore(self, x: Array) -> Array:
        """The inputs as the layer has them."""
        by_code = x.reshape(len(x), UNITS[self.bits][0], -1)
        x = by_code.swapaxes(1, 2).reshape(x.shape)
        return x if self.permutation is None else x[:, np.argsort(self.permutation)]

    def rows(self, indices: npt.NDArray[Any]) -> Array:
        """Rows of the matrix, (...) -> (..., I), their columns in the layer's order."""
        flat = indices.reshape(-1)
        parts = {name: getattr(self, name)[flat] for name in ("codes", "scales", "biases")}
        few = replace(self, **parts)
        return self.restore(few.block(0, len(flat))).reshape(*indices.shape, -1)

    def block(self, start: int, stop: int) -> Array:
        """By a kernel, or by NumPy."""
        scales, biases = (
            _widened(numbers[start:stop], self.is_bfloat16)
            for numbers in (self.scales, self.biases)
        )
        codes, C = self.codes[start:stop], UNITS[self.bits][0]
        block = np.empty((stop - start, self.shape[1]), np.float32)
        if kernels() is None:
            self._unpack(codes, scales, biases, block.reshape(stop - start, C, -1))
        else:
            kernels().unpack(codes, scales, biases, self.bits, C, block)
        return block

    def _unpack(self, codes: Any, scales: Array, biases: Array, block: Array) -> None:
        """As `kernels.unpack`, into (n, C, U)."""
        words = codes.reshape(len(codes), -1, UNITS[self.bits][1])
        units = block.shape[2] // scales.shape[1]
        scales, biases = scales.repeat(units, axis=1), biases.repeat(units, axis=1)
        for k in range(block.shape[1]):
            m, shift = divmod(k * self.bits, 32)
            part = words[..., m] >> np.uint32(shift)
            if shift + self.bits > 32:
                part |= words[..., m + 1] << np.uint32(32 - shift)
            part &= np.uint32((1 << self.bits) - 1)
            np.multiply(part.astype(np.float32), scales, out=block[:, k])
            block[:, k] += biases

    def dot(self, x: Array, outputs: Array, start: int, stop: int) -> None:
        """By a kernel, if there is one for so many bits."""
        if not self._has_kernel():
            _dot_blocks(self, x, outputs, start, stop)
            return
        part = (self.codes[start:stop], self.scales[start:stop], self.biases[start:stop])
        dot = kernels().dot_words(self.bits, self.codes.shape[1] // self.scales.shape[1])
        products = np.empty((len(x), stop - start), np.float32)
        dot(*part, self.is_bfloat16, x.reshape(len(x), UNITS[self.bits][0], -1), products)
        outputs[:, start:stop] = products

    def columns(self, x: Array) -> Array:
        """Inputs (R, I) as `dot_columns` takes them."""
        if self.permutation is not None:
            x = x[:, self.permutation]
        (R, I), made = x.shape, columns()  # noqa: E741 - inputs
        packed = np.empty(-(-R // made.LANES) * made.LANES * I, np.float32)

        def part(start: int, stop: int) -> None:
            made.pack(x, 32 // self.bits, start, stop, packed)

        parallel(part, -(-I // made.DEPTH), MOVE * x.size)
        return packed

    def dot_columns(self, packed: Array, outputs: Array, start: int, stop: int) -> None:
        """As `dot`, of many rows."""
        scales, biases = (
            _widened(part[start:stop], self.is_bfloat16) for part in (self.scales, self.biases)
        )
        product = columns().product(self.bits, self.codes.shape[1] // self.scales.shape[1])
        product(self.codes[start:stop], scales, biases, packed, outputs[:, start:stop])
