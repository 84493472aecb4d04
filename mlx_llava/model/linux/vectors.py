"""Sixteen numbers at a time, in functions that numba compiles: one AVX-512 register, or a few.

What numba makes of a loop over single numbers is as fast or three times slower, at LLVM's whim.
numba keeps what it has compiled until kernels.py changes: touch that file after a change here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model
from numba.np.arrayobj import make_array

Generated: TypeAlias = "tuple[Any, Callable[..., Any]]"

LANES = 16
_INT, _FLOAT = ir.IntType(32), ir.FloatType()


class _Vector(types.Type):  # type: ignore[misc]
    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name)
        self.ir = ir.VectorType(element, LANES)


FLOATS, WORDS = _Vector("Floats", _FLOAT), _Vector("Words", _INT)


@register_model(_Vector)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, vector.ir)


def _address(context: Any, builder: Any, array: Any, args: Any, what: ir.Type) -> Any:
    """Where the number of an array at an index is, as a pointer to something."""
    data = make_array(array)(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), what.as_pointer())


def _call(builder: Any, name: str, returns: ir.Type, *args: Any, **how: Any) -> Any:
    """One of LLVM's own functions."""
    signature = ir.FunctionType(returns, [arg.type for arg in args])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, signature, name), args, **how
    )


@intrinsic  # type: ignore[untyped-decorator]
def zeros(_: Any) -> Generated:
    """Sixteen times 0.0."""
    return FLOATS(), lambda *_: ir.Constant(FLOATS.ir, [0.0] * LANES)


@intrinsic  # type: ignore[untyped-decorator]
def load(_: Any, array: Any, index: Any) -> Generated:
    """The numbers from an index on, of an array of float32 or uint32."""
    vector = FLOATS if array.dtype == types.float32 else WORDS

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, array, args, vector.ir), align=4)

    return vector(array, index), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def load_repeated(_: Any, array: Any, index: Any, times: Any) -> Generated:
    """As many float32 as there are, each so many times, a power of two."""
    count = max(1, LANES // times.literal_value)
    lanes = ir.Constant(WORDS.ir, [lane * count // LANES for lane in range(LANES)])

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        address = _address(context, builder, array, args, ir.VectorType(_FLOAT, count))
        few = builder.load(address, align=4)
        return builder.shuffle_vector(few, few, lanes)

    return FLOATS(array, index, times), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def codes(_: Any, words: Any, k: Any, bits: Any) -> Generated:
    """The k-th code of so many bits of each word, as float32."""
    mask = ir.Constant(WORDS.ir, [(1 << bits.literal_value) - 1] * LANES)

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        shift = builder.trunc(builder.mul(args[1], args[1].type(bits.literal_value)), _INT)
        shift = builder.insert_element(ir.Constant(WORDS.ir, ir.Undefined), shift, _INT(0))
        shifts = builder.shuffle_vector(shift, shift, ir.Constant(WORDS.ir, [0] * LANES))
        return builder.sitofp(builder.and_(builder.lshr(args[0], shifts), mask), FLOATS.ir)

    return FLOATS(words, types.unliteral(k), bits), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(_: Any, x: Any, y: Any, z: Any) -> Generated:
    """``x * y + z``."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return _call(builder, f"llvm.fma.v{LANES}f32", FLOATS.ir, *args)

    return FLOATS(x, y, z), generate


@intrinsic  # type: ignore[untyped-decorator]
def total(_: Any, x: Any) -> Generated:
    """Their sum."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return _call(builder, name, _FLOAT, _FLOAT(0.0), args[0], fastmath=["reassoc"])

    return types.float32(x), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_: Any, array: Any, index: Any) -> Generated:
    """Has what stands at an index brought to the cache, if it is there at all."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        address = _address(context, builder, array, args, ir.IntType(8))
        to_read, to_keep, data = _INT(0), _INT(3), _INT(1)
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), address, to_read, to_keep, data)
        return context.get_dummy_value()

    return types.void(array, index), generate
