"""Tensors of a checkpoint that are described now and read later, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a file, or what is computed from some.

    Attributes:
        source: where it comes from, for people.
        shape: its shape.
        dtype: its MLX dtype.
        read: reads or computes it; every call does it anew and keeps nothing.
    """

    source: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]

    def then(self, change: Callable[[mx.array], mx.array]) -> LazyTensor:
        """This tensor after a change; shape and dtype follow from the change itself."""
        return combine([self], lambda arrays: change(arrays[0]))


def combine(
    tensors: Sequence[LazyTensor], compute: Callable[[list[mx.array]], mx.array]
) -> LazyTensor:
    """What `compute` makes of several tensors.

    Args:
        tensors (list of LazyTensor): Its inputs.
        compute (callable): MLX arrays -> an MLX array, by MLX operations alone: it is also
            called with placeholders, to learn shape and dtype without computing anything.
    """
    shadow = compute([mx.zeros(tensor.shape, tensor.dtype) for tensor in tensors])
    return LazyTensor(
        source=" + ".join(tensor.source for tensor in tensors),
        shape=shadow.shape,
        dtype=shadow.dtype,
        read=lambda: compute([tensor.read() for tensor in tensors]),
    )


def from_array(source: str, array: mx.array) -> LazyTensor:
    """A small tensor that is in memory already."""
    return LazyTensor(source, array.shape, array.dtype, lambda: array)


#: How file formats name their dtypes -> MLX's, and NumPy's to read them with. NumPy has no
#: bfloat16, and MLX no float64 on a GPU.
FILE_DTYPES: dict[str, tuple[mx.Dtype, str]] = {
    "F64": (mx.float32, "<f8"),
    "F32": (mx.float32, "<f4"),
    "F16": (mx.float16, "<f2"),
    "BF16": (mx.bfloat16, "<u2"),
    "I64": (mx.int64, "<i8"),
    "I32": (mx.int32, "<i4"),
    "I16": (mx.int16, "<i2"),
    "I8": (mx.int8, "i1"),
    "U32": (mx.uint32, "<u4"),
    "U8": (mx.uint8, "u1"),
    "BOOL": (mx.bool_, "?"),
}
#: The bytes of one stored value.
ITEM_SIZES = {kind: np.dtype(stored).itemsize for kind, (_, stored) in FILE_DTYPES.items()}


def to_mlx(array: npt.NDArray[Any], kind: str) -> mx.array:
    """Copies raw values as read from a file into MLX."""
    dtype, _ = FILE_DTYPES[kind]
    if kind == "BF16":
        return mx.array(array).view(mx.bfloat16)
    if kind == "F64":
        array = array.astype(np.float32)
    return mx.array(array).astype(dtype)


def map_values(path: Path, offset: int, count: int, kind: str) -> npt.NDArray[Any]:
    """Maps `count` values of a file into memory; they leave it with the returned array."""
    dtype = np.dtype(FILE_DTYPES[kind][1])
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


@dataclass(frozen=True)
class Output:
    """Tensors to be written that are computed together, as a quantised layer's three are.

    Attributes:
        tensors: name, shape and dtype of each.
        compute: makes them, in the same order.
        source: where they come from, for people.
    """

    tensors: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...]
    compute: Callable[[], Sequence[mx.array]]
    source: str

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""
        return sum(math.prod(shape) * dtype.size for _, shape, dtype in self.tensors)


def output(name: str, tensor: LazyTensor) -> Output:
    """One tensor to be written as it is."""
    return Output(((name, tensor.shape, tensor.dtype),), lambda: [tensor.read()], tensor.source)
