"""Sixteen numbers at a time, in functions that numba compiles: one AVX-512 register, or a few.

What numba makes of a loop over single numbers is as fast or three times slower, at LLVM's whim.
numba keeps what it has compiled until kernels.py changes: touch that file after a change here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model
from numba.np.arrayobj import make_array

Generated: TypeAlias = "tuple[Any, Callable[..., Any]]"

LANES = 16
#: How many rows of weights `add_products` multiplies with.
HEIGHT = 8
_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_LONG = ir.IntType(64)


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


def _splat(builder: Any, number: Any, vector: _Vector) -> Any:
    """A number in every lane."""
    lanes = builder.insert_element(ir.Constant(vector.ir, ir.Undefined), number, _INT(0))
    return builder.shuffle_vector(lanes, lanes, ir.Constant(WORDS.ir, [0] * LANES))


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


@intrinsic  # type: ignore[untyped-decorator]
def store(_: Any, array: Any, index: Any, x: Any) -> Generated:
    """Writes float32 to an array from an index on."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, array, args, FLOATS.ir), align=4)
        return context.get_dummy_value()

    return types.void(array, index, x), generate


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
        shifts = _splat(builder, shift, WORDS)
        return builder.sitofp(builder.and_(builder.lshr(args[0], shifts), mask), FLOATS.ir)

    return FLOATS(words, types.unliteral(k), bits), generate


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", FLOATS.ir, x, y, z)


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(_: Any, x: Any, y: Any, z: Any) -> Generated:
    """``x * y + z``."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return _multiply_add(builder, *args)

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


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_products(
    _: Any,
    sums: Any,
    first: Any,
    stride: Any,
    weights: Any,
    columns: Any,
    start: Any,
    depth: Any,
    width: Any,
) -> Generated:
    """Adds weights (HEIGHT, depth) times columns (depth, width LANES) to sums.

    All are flat; the columns begin at an index, and the sums at another, their rows a stride apart.
    They are added up in registers: a width of 3 takes 24 of AVX-512's 32, and 4 for what is
    multiplied.
    """
    rows, across = range(HEIGHT), range(width.literal_value)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        def address(array: Any, value: Any, index: Any, what: ir.Type) -> Any:
            return _address(context, builder, array, (value, index), what)

        def at(index: Any, times: int, step: Any, more: int = 0) -> Any:
            step = builder.mul(step, _LONG(times))
            return builder.add(builder.add(index, step), _LONG(more))

        before, loop = builder.basic_block, builder.append_basic_block()
        after = builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        i = builder.phi(_LONG)
        parts = [[builder.phi(FLOATS.ir) for _ in across] for _ in rows]
        own = [
            builder.load(
                address(
                    columns, args[4], at(args[5], len(across) * LANES, i, v * LANES), FLOATS.ir
                ),
                align=4,
            )
            for v in across
        ]
        totals = []
        for m in rows:
            weight = builder.load(address(weights, args[3], at(i, m, args[6]), _FLOAT))
            lanes = _splat(builder, weight, FLOATS)
            totals.append([_multiply_add(builder, lanes, own[v], parts[m][v]) for v in across])
        following = builder.add(i, _LONG(1))
        builder.cbranch(builder.icmp_signed("<", following, args[6]), loop, after)
        i.add_incoming(_LONG(0), before)
        i.add_incoming(following, loop)
        builder.position_at_end(after)
        for m, v in product(rows, across):
            parts[m][v].add_incoming(ir.Constant(FLOATS.ir, [0.0] * LANES), before)
            parts[m][v].add_incoming(totals[m][v], loop)
            place = address(sums, args[0], at(args[1], m, args[2], v * LANES), FLOATS.ir)
            builder.store(builder.fadd(builder.load(place, align=4), totals[m][v]), place, align=4)
        return context.get_dummy_value()

    return types.void(sums, first, stride, weights, columns, start, depth, width), generate
