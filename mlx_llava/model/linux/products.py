"""Products of rows with weights in whatever form, which all threads share.

R rows, I inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from mlx_llava.model.linux.threads import parallel
from mlx_llava.model.linux.weights import SOME, Affine, Array, Plain, Weight

#: How many numbers a block of float32 has: with fewer rows it would be the inputs that cost.
BLOCK = 1 << 21
#: Into how many parts products that are made together are cut.
SHARES = 1 << 10


def _blocks(weight: Weight, start: int, stop: int) -> Iterator[tuple[slice, Array]]:
    """The rows from start to stop as float32, a block at a time."""
    step = max(1, BLOCK // weight.shape[1])
    if isinstance(weight, Plain):  # nothing is to be kept in a cache
        step = stop - start
    for first in range(start, stop, step):
        last = min(first + step, stop)
        yield slice(first, last), weight.block(first, last)


class _Product(Protocol):
    """``x @ weight.T``, (R, I) and (N, I) -> (R, N).

    Attributes:
        outputs: (R, N), or a view of its transpose.
    """

    outputs: Array

    def share(self, start: int, stop: int) -> None:
        """The outputs from start to stop."""


class _ByRows:
    """With the rows as they are, by BLAS, or by `Weight.dot` where they are few."""

    def __init__(self, x: Array, weight: Weight) -> None:
        N, self._weight, self._rows = weight.shape[0], weight, weight.order(x)
        self._is_few = len(x) <= weight.few
        is_left = not self._is_few and len(x) <= SOME
        self._columns = np.ascontiguousarray(self._rows.T) if is_left else self._rows.T
        self.outputs = (
            np.empty((N, len(x)), np.float32).T if is_left else np.empty((len(x), N), np.float32)
        )
        self._is_left = is_left

    def share(self, start: int, stop: int) -> None:
        """As `_Product`."""
        if self._is_few:
            self._weight.dot(self._rows, self.outputs, start, stop)
            return
        for own, block in _blocks(self._weight, start, stop):
            if self._is_left:
                np.matmul(block, self._columns, out=self.outputs.T[own])
            else:
                np.matmul(self._rows, block.T, out=self.outputs[:, own])


class _ByColumns:
    """With many rows, packed for a kernel."""

    def __init__(self, R: int, columns: Array, weight: Affine) -> None:
        self._columns, self._weight = columns, weight
        self.outputs = np.empty((R, weight.shape[0]), np.float32)

    def share(self, start: int, stop: int) -> None:
        """As `_Product`."""
        self._weight.dot_columns(self._columns, self.outputs, start, stop)


def _products(x: Array, weights: Sequence[Weight]) -> Iterator[_Product]:
    """One for each weight; what they can share is packed once."""
    packed: dict[int, Array] = {}
    for weight in weights:
        if len(x) <= SOME or not isinstance(weight, Affine) or not weight.is_read_by_columns:
            yield _ByRows(x, weight)
        elif weight.permutation is not None:
            yield _ByColumns(len(x), weight.columns(x), weight)
        else:
            if weight.bits not in packed:
                packed[weight.bits] = weight.columns(x)
            yield _ByColumns(len(x), packed[weight.bits], weight)


def multiply(x: Array, *weights: Weight, biases: Sequence[Array | None] = ()) -> list[Array]:
    """``x @ weight.T`` for each weight, and its bias if it has one: (..., I) -> (..., N)."""
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    products = [*_products(rows, weights)]
    biases = biases or [None] * len(weights)

    def share(start: int, stop: int) -> None:
        for product, bias in zip(products, biases, strict=True):
            N = product.outputs.shape[1]
            first, last = (N * end // SHARES for end in (start, stop))
            product.share(first, last)
            if bias is not None:
                product.outputs[:, first:last] += bias[first:last]

    parallel(share, SHARES, rows.size * sum(weight.shape[0] for weight in weights))
    return [
        np.ascontiguousarray(product.outputs).reshape(*x.shape[:-1], -1) for product in products
    ]


def multiply_back(y: Array, weight: Weight) -> Array:
    """``y @ weight``, the gradient of the inputs: (..., N) -> (..., I)."""
    N, inputs = weight.shape
    rows = np.ascontiguousarray(y).reshape(-1, N)
    sums: dict[int, Array] = {}

    def part(start: int, stop: int) -> None:
        sums[start] = np.zeros((len(rows), inputs), np.float32)
        for own, block in _blocks(weight, start, stop):
            sums[start] += rows[:, own] @ block

    parallel(part, N, rows.size * inputs)
    x = np.add.reduce([sums[start] for start in sorted(sums)])
    return weight.restore(x).reshape(*y.shape[:-1], inputs)
