"""How does Numba compute batch norm? The algorithm of the C core (src_c), compiled on first use and kept on disk.

A call reduces (sums over each channel), finishes (a channel's constants from its sums) and maps (y or dx from the
constants). Where a block of channels fits in a core's cache, one thread does all three on it. Otherwise all threads
reduce, then finish, then map, from the end backwards: the end is what the cache still holds.

The data is walked in runs, stretches of memory whose columns recur: columns of all channels (channels-last), of a
block of channels (small planes) or of one channel (larger planes). Each column has constants and sums of its own.
There are two loops over a run: one reduces, one maps. They take a vector at a time, a line of the cache, so that
asking which activation it is costs next to nothing, and nothing is compiled anew for another.

The sums of a channel are taken by segments, whose bounds follow from the shape alone, and segments are added in order.
So neither the blocking nor the number of threads changes a bit.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from .. import _threads
from . import SAVED_ROWS

DTYPES = frozenset({"float32", "float64"})

Array = np.ndarray[Any, Any]
Vector = Any  # of data; a wide one is of float64, and has as many lanes
Pointer = Any
Range = tuple[int, int]

LINE_BYTES = 64  # of the cache, and of a vector of data
SEGMENT = 32768  # values of a channel that a segment of planes has at least, and a cut of a plane
SEGMENT_ROWS = 128  # rows that a segment of rows has at least,
SEGMENTS_MOST = 64  # and how many of these there are at most
PLANE = 512  # values that a plane has at least to be walked by itself
COLUMNS = 128  # that recur at least, so that no sum waits for the last value's
BLOCK_COLUMNS = 1024  # that a block of channels has at most
BLOCK_BYTES = 1 << 19  # of a block: half of a common level 2 cache
STRETCH = 16384  # values that a map takes in order, before it turns to those in front of them
AHEAD = 1024  # values between those that a loop takes and those that it fetches
WORK_PER_THREAD = 32768  # values that are worth waking a thread for
STREAM_BYTES = 1 << 24  # of a result that no cache keeps: it is written around them

REDUCE, FINISH, MAP = 1, 2, 4
IDENTITY, RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH, SIGMOID = range(7)  # the codes of fastbn._activations
MEAN, MEAN_LOW, VAR, INV_STD, GAMMA, BETA = range(len(SAVED_ROWS))
PRESCALE, NEG_MEAN, SCALE, SHIFT, SHIFT_LOW, ON_DY, ON_X, CONSTANT, POSTSCALE = range(9)
CONSTANTS, LINE = 9, 5  # how many there are, and how many of them a forward map takes
LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.121944400546905827679e-4  # n * LN2_HIGH is exact
SERIES = tuple(1 / math.factorial(k) for k in range(13, -1, -1))  # of exp, to 2**-57 for |x| <= log(2)/2


def _compiled(*fastmath: str, **options: bool) -> Callable[[Callable[..., Any]], Any]:
    """The decorator of every compiled function. Division by zero gives inf."""
    njit: Any = numba.njit

    def compiled(function: Callable[..., Any]) -> Any:
        jit = functools.partial(njit, nogil=True, error_model="numpy", fastmath=set(fastmath), **options)
        try:
            return jit(cache=True)(function)
        except RuntimeError:  # nowhere on disk may be written
            return jit()(function)

    return compiled


_jit = _compiled()
_inline = _compiled(forceinline=True)
_parallel = _compiled(parallel=True)


# ---- vectors, and what else Numba has no word for: written in LLVM's ----


class _VectorType(types.Type):  # type: ignore[misc]
    def __init__(self, element: Any, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"vector({element}, {lanes})")


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.element).get_value_type(), kind.lanes))


def _vector_of(element: Any) -> Any:
    return _VectorType(element, LINE_BYTES * 8 // element.bitwidth)


def _wide(vector: Any) -> Any:
    return _VectorType(types.float64, vector.lanes)


def _give_operator(symbol: Any, instruction: str) -> None:
    """Vectors add, subtract, multiply and divide as floats do."""

    def result(context: Any) -> Any:
        return lambda a, b: a if isinstance(a, _VectorType) and a == b else None

    def write(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return getattr(builder, instruction)(*values)

    type_callable(symbol)(result)
    lower_builtin(symbol, _VectorType, _VectorType)(write)


for _symbol, _instruction in (("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")):
    _give_operator(getattr(operator, _symbol), _instruction)


def _written(signature: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """The decorator of a function that writes code, given the builder, the result's type and the arguments' values.

    From the arguments' types `signature` makes the type of the whole.
    """

    def decorator(write: Callable[..., Any]) -> Any:
        def typed(typing: Any, *kinds: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                made = write(builder, context.get_value_type(signature.return_type), *values)
                return context.get_dummy_value() if made is None else made

            return signature(*kinds), generate

        named = inspect.signature(write)
        typed.__signature__ = named.replace(parameters=list(named.parameters.values())[1:])  # type: ignore[attr-defined]
        typed.__name__, typed.__doc__ = write.__name__, write.__doc__
        return intrinsic(typed)

    return decorator


def _of_one_kind(a: Any, *others: Any) -> Any:
    return a(a, *[a for _ in others])


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _splat(builder: Any, vector: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, _constant(ir.VectorType(ir.IntType(32), vector.count), 0))


def _operation(builder: Any, name: str, *values: Any) -> Any:
    """One of LLVM's own, whose arguments and result are of the same type."""
    kind = values[0].type
    full_name = f"{name}.v{kind.count}{kind.element.intrinsic_name}"
    function_type = ir.FunctionType(kind, [kind for _ in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, full_name), values)


def _vector_at(builder: Any, pointer: Any, i: Any, vector: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [i]), vector.as_pointer())


def _copy_lanes(builder: Any, source: Any, to: Any, lanes: int, n: Any) -> None:
    """The first n."""
    for k in range(lanes):
        lane = ir.Constant(n.type, k)
        with builder.if_then(builder.icmp_signed("<", lane, n)):
            builder.store(builder.load(builder.gep(source, [lane])), builder.gep(to, [lane]))


@_written(lambda data, i, n: _vector_of(data.dtype)(data, types.int64, types.int64))
def _load(builder: Any, vector: Any, data: Any, i: Any, n: Any) -> Any:
    """A vector of data from i on, where there are n left: behind them zeros follow."""
    with builder.if_else(builder.icmp_signed(">=", n, ir.Constant(n.type, vector.count)), likely=True) as (all_, some):
        with all_:
            whole = builder.load(_vector_at(builder, data, i, vector), align=1), builder.block
        with some:
            room = cgutils.alloca_once_value(builder, ir.Constant(vector, None))
            lanes = builder.bitcast(room, vector.element.as_pointer())
            _copy_lanes(builder, builder.gep(data, [i]), lanes, vector.count, n)
            part = builder.load(room), builder.block
    found = builder.phi(vector)
    found.add_incoming(*whole)
    found.add_incoming(*part)
    return found


@_written(lambda pointer, i, v, n: types.void(pointer, types.int64, v, types.int64))
def _set_some(builder: Any, _: Any, pointer: Any, i: Any, v: Any, n: Any) -> None:
    """Stores the first n lanes."""
    lanes = builder.bitcast(cgutils.alloca_once_value(builder, v), v.type.element.as_pointer())
    _copy_lanes(builder, lanes, builder.gep(pointer, [i]), v.type.count, n)


@_written(lambda pointer, i, like: _VectorType(pointer.dtype, like.lanes)(pointer, types.int64, like))
def _get(builder: Any, vector: Any, pointer: Any, i: Any, like: Any) -> Any:
    """So many values, of any dtype, as a vector has."""
    return builder.load(_vector_at(builder, pointer, i, vector), align=1)


@_written(lambda pointer, i, v: types.void(pointer, types.int64, v))
def _set(builder: Any, _: Any, pointer: Any, i: Any, v: Any) -> None:
    builder.store(v, _vector_at(builder, pointer, i, v.type), align=1)


@_written(lambda pointer, i, v: types.void(pointer, types.int64, v))
def _stream(builder: Any, _: Any, pointer: Any, i: Any, v: Any) -> None:
    """Stores a vector around the cache, where one of its lines begins."""
    store = builder.store(v, _vector_at(builder, pointer, i, v.type), align=LINE_BYTES)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


@_written(lambda value, like: like(like.element, like))
def _all(builder: Any, vector: Any, value: Any, like: Any) -> Any:
    """The value in each lane."""
    return _splat(builder, vector, value)


@_written(lambda v: _wide(v)(v))
def _widened(builder: Any, vector: Any, v: Any) -> Any:
    return v if v.type == vector else builder.fpext(v, vector)


@_written(lambda v, like: like(v, like))
def _narrowed(builder: Any, vector: Any, v: Any, like: Any) -> Any:
    return v if v.type == vector else builder.fptrunc(v, vector)


@_written(_of_one_kind)
def _fused(builder: Any, _: Any, a: Any, b: Any, c: Any) -> Any:
    """The sum a * b + c, rounded once where the processor can."""
    return _operation(builder, "llvm.fmuladd", a, b, c)


@_written(_of_one_kind)
def _magnitude(builder: Any, _: Any, v: Any) -> Any:
    return _operation(builder, "llvm.fabs", v)


@_written(_of_one_kind)
def _rounded(builder: Any, _: Any, v: Any) -> Any:
    return _operation(builder, "llvm.rint", v)


@_written(_of_one_kind)
def _where_less(builder: Any, _: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """In each lane x where a < b, else, and where there is a NaN, y."""
    return builder.select(builder.fcmp_ordered("<", a, b), x, y)


@_written(_of_one_kind)
def _where_at_most(builder: Any, _: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<=", a, b), x, y)


@_written(_of_one_kind)
def _no_nan(builder: Any, _: Any, v: Any) -> Any:
    """Zero instead."""
    return builder.select(builder.fcmp_ordered("ord", v, v), v, ir.Constant(v.type, None))


@_written(lambda v, n: v(v, types.int64))
def _first(builder: Any, vector: Any, v: Any, n: Any) -> Any:
    """The first n lanes, and zeros."""
    numbers = ir.VectorType(n.type, vector.count)
    inside = builder.icmp_signed("<", ir.Constant(numbers, list(range(vector.count))), _splat(builder, numbers, n))
    return builder.select(inside, v, ir.Constant(vector, None))


@_written(lambda kept, i, x, y: x(kept, types.int64, x, x))
def _where_kept(builder: Any, vector: Any, kept: Any, i: Any, x: Any, y: Any) -> Any:
    """In each lane x where the mask has True, else y."""
    flags = ir.VectorType(ir.IntType(8), vector.count)
    found = builder.load(_vector_at(builder, kept, i, flags), align=1)
    return builder.select(builder.icmp_unsigned("!=", found, ir.Constant(flags, None)), x, y)


@_written(_of_one_kind)
def _scaled(builder: Any, vector: Any, v: Any, n: Any) -> Any:
    """The product of v and two to the n, a whole number and not positive; rounded once where it is denormal."""
    narrow = vector.element == ir.FloatType()
    bits, mantissa, bias, least = (32, 23, 127, -100) if narrow else (64, 52, 1023, -1000)
    integers, lowest = ir.VectorType(ir.IntType(bits), vector.count), _constant(vector, least)
    for _ in range(2):
        part = builder.select(builder.fcmp_ordered("<", n, lowest), lowest, n)
        n = builder.fsub(n, part)
        last_bits = builder.bitcast(builder.fadd(part, _constant(vector, 1.5 * 2.0**mantissa)), integers)
        power = builder.shl(builder.add(last_bits, _constant(integers, bias)), _constant(integers, mantissa))
        v = builder.fmul(v, builder.bitcast(power, vector))
    return v


@_written(lambda pointer: types.int64(pointer))
def _address(builder: Any, integer: Any, pointer: Any) -> Any:
    return builder.ptrtoint(pointer, integer)


@_written(lambda pointer, i: types.void(pointer, types.int64))
def _fetch(builder: Any, _: Any, pointer: Any, i: Any) -> None:
    """Begins to bring a value into the cache. It need not exist."""
    byte, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, integer, integer, integer])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    at = builder.bitcast(builder.gep(pointer, [i]), byte)
    builder.call(prefetch, [at, *(ir.Constant(integer, k) for k in (0, 3, 1))])  # to read, to keep, data


@_written(lambda: types.void())
def _fence(builder: Any, _: Any) -> None:
    """What was streamed is there for other threads."""
    builder.fence("seq_cst")


def _make_pointers(typing: Any, arrays: Any) -> Any:
    """Where each array begins: loops would spend their time counting references to arrays."""
    pointers = types.NamedTuple([types.CPointer(kind.dtype) for kind in arrays.types], arrays.instance_class)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        members = enumerate(arrays.types)
        each = [context.make_array(kind)(context, builder, builder.extract_value(values[0], k)) for k, kind in members]
        return context.make_tuple(builder, pointers, [array.data for array in each])

    return pointers(arrays), generate


_pointers: Any = intrinsic(_make_pointers)


# ---- what compiled code is told ----


class _Plan(NamedTuple):
    """How a call is split. A unit is a row (all channels of some positions or samples), or a plane or a cut of one."""

    size: int
    lanes: int  # of a vector of data
    channels: int
    inner: int
    rows: bool
    width: int  # of a row, in which channels may come several times
    together: bool  # a block has whole rows
    columns: int  # of a block
    span: int  # columns of a channel that lie together
    padded: int  # what a buffer has for each column, and for the first ones once more
    longest: int  # values of a run that has a mask
    ahead: int  # from a value to one that is needed later
    cut: int  # values in a cut of a plane, which may be all of it
    cuts: int  # cuts in a plane
    units: int
    segment: int  # units in a segment
    segments: int
    stretch: int  # units that a map takes in order
    block: int  # channels in a block
    blocks: int
    by_channels: bool  # a thread does all steps on a block


class _Task(NamedTuple):
    """What a call computes."""

    activation: int
    slope: float
    eps: float
    count: float  # type: ignore[assignment]  # of the values in each channel's statistics
    backward: bool
    adds: bool  # a residual
    keeps: bool  # its gradient
    masked: bool
    frozen: bool
    from_y: bool
    reduces: bool
    stream: bool


class _Arrays(NamedTuple):
    """The arrays of one call. Where there is no residual, dy, mask or dresidual, another array stands there unused."""

    x: Array  # flat, like the next five
    residual: Array
    dy: Array
    mask: Array
    out: Array  # y or dx
    dresidual: Array
    origin: Array  # (1, channels), of the sums; the mean in a backward call
    sums: Array  # (segments, 2, channels)
    totals: Array  # (2, channels): of all segments; in a backward call dbeta and dgamma
    saved: Array  # (6, channels)
    constants: Array  # (CONSTANTS, channels), in the data's dtype
    # Buffers: for each thread so many rows, each with a value for each column.
    lines: Array  # CONSTANTS
    origins: Array  # 1
    parts: Array  # 2: the sums
    kept: Array  # what the mask says of a run


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=256)
def _plan(shape: tuple[int, ...], itemsize: int, threads: int) -> _Plan:
    outer, channels, inner = shape
    lanes = LINE_BYTES // itemsize
    rows = inner < PLANE
    repeats = _divide_up(COLUMNS, channels * inner) if rows else 1
    width = repeats * channels * inner
    cut = inner if inner <= 2 * SEGMENT else SEGMENT
    cuts = _divide_up(inner, cut)
    if rows:
        units = _divide_up(outer, repeats)
        segment = max(_divide_up(SEGMENT_ROWS, repeats), _divide_up(units, SEGMENTS_MOST))
        block = min(_divide_up(channels, threads), min(BLOCK_BYTES // (outer * itemsize), BLOCK_COLUMNS) // inner)
        worth = repeats == 1 and block * inner >= COLUMNS
    else:
        units = outer * cuts
        segment = max(1, SEGMENT // cut)
        block, worth = 1, cuts == 1
    blocks = _divide_up(channels, max(1, block))
    by_channels = worth and 5 * _divide_up(blocks, threads) * threads <= 7 * blocks
    if rows and not by_channels:
        block, blocks = channels, 1
    together = rows and block == channels
    columns = COLUMNS if not rows else width if together else block * inner
    unit = columns if rows else cut
    return _Plan(
        size=outer * channels * inner,
        lanes=lanes,
        channels=channels,
        inner=inner,
        rows=rows,
        width=width,
        together=together,
        columns=columns,
        span=inner if rows else COLUMNS,
        padded=(_divide_up(columns + lanes, lanes) | 1) * lanes,  # odd: rows begin with different lines of the cache
        longest=unit + lanes,
        ahead=AHEAD if together or not rows else width * _divide_up(AHEAD, columns),
        cut=cut,
        cuts=cuts,
        units=units,
        segment=segment,
        segments=_divide_up(units, segment),
        stretch=_divide_up(STRETCH, unit),
        block=block,
        blocks=blocks,
        by_channels=by_channels,
    )


@_jit
def _part(n: int, t: int, threads: int) -> Range:
    """Thread t's part of range(n)."""
    return n * t // threads, n * (t + 1) // threads


# ---- columns, from channels and back ----


@_jit
def _spread(p: _Plan, values: Array, rows: int, strip: Range, buffer: Pointer, base: int) -> None:
    """Gives each column its channel's value."""
    for row in range(rows):
        k = base + row * p.padded
        end = k + p.padded
        while k < end:
            for c in range(strip[0], strip[1]):
                value = values[row, c]
                for i in range(k, min(k + p.span, end)):
                    buffer[i] = value
                k += p.span


@_compiled("reassoc")  # in any order, hence by vectors
def _fold(p: _Plan, buffer: Pointer, base: int, strip: Range, sums: Array) -> None:
    """Adds up what the columns of each channel have."""
    for row in range(2):
        for c in range(strip[0], strip[1]):
            sums[row, c] = 0.0
        k = base + row * p.padded
        end = k + p.padded
        while k < end:
            for c in range(strip[0], strip[1]):
                total = 0.0
                for i in range(k, min(k + p.span, end)):
                    total += buffer[i]
                sums[row, c] += total
                k += p.span


@_jit
def _keep(p: _Plan, mask: Pointer, start: int, n: int, kept: Pointer, base: int) -> None:
    """What the mask says of each value of a run."""
    i = 0
    while i < n:
        row, at = (start + i) // (p.channels * p.inner), (start + i) % p.inner
        if p.inner == 1:
            end = min(n, i + p.channels - (start + i) % p.channels)
            value = mask[row]
            for j in range(i, end):
                kept[base + j] = value
        else:
            end = min(n, i + p.inner - at)
            for j in range(i, end):
                kept[base + j] = mask[row * p.inner + at + j - i]
        i = end


# ---- one vector: of data from i on, whose columns are those from k on ----


@_inline
def _row(p: _Plan, a: _Arrays, row: int, k: int, like: Vector) -> Vector:
    return _get(a.lines, row * p.padded + k, like)


@_inline
def _preactivation(p: _Plan, q: _Task, a: _Arrays, x: Vector, i: int, k: int) -> Vector:
    """What the activation gets.

    x - mean_hi is exact where x is near the mean, whatever the offset. shift_low is what shift lost to rounding: it is
    added last, since y is near the shift where it matters. A residual may cancel the shift, so their sum
    keeps what its rounding loses (Knuth's two-sum); where the sum is infinite there is nothing to keep.
    """
    d = _fused(x, _row(p, a, PRESCALE, k, x), _row(p, a, NEG_MEAN, k, x))
    scale, shift, shift_low = _row(p, a, SCALE, k, x), _row(p, a, SHIFT, k, x), _row(p, a, SHIFT_LOW, k, x)
    if not q.adds:
        return _fused(d, scale, shift) + shift_low
    residual = _load(a.residual, i, p.size - i)
    total = shift + residual
    back = total - shift
    lost = ((shift - (total - back)) + (residual - back)) + shift_low
    return _fused(d, scale, total) + _no_nan(lost)


@_inline
def _x_from_y(p: _Plan, q: _Task, a: _Arrays, y: Vector, i: int, k: int) -> Vector:
    """The x - mean that the line and the activation made y of; 0 where its slope is, as in constant ones."""
    z = _widened(y)
    if q.activation == LEAKY_RELU:
        z = _where_less(_all(0.0, z), z, z, z * _all(1 / q.slope, z))
    if q.adds:
        z = z - _widened(_load(a.residual, i, p.size - i))
    z = (z - _widened(_row(p, a, SHIFT, k, y))) - _widened(_row(p, a, SHIFT_LOW, k, y))
    slope = _widened(_row(p, a, SCALE, k, y)) * _widened(_row(p, a, PRESCALE, k, y))
    x, zero = z / slope, _all(0.0, z)
    return _narrowed(_where_less(slope, zero, x, _where_less(zero, slope, x, zero)), y)


@_inline
def _exp(x: Vector) -> Vector:
    """The exponential of x <= 0, to an ulp: two to the n times the power series of the rest."""
    lowest = _all(-1100.0, x)
    x = _where_less(x, lowest, lowest, x)
    n = _rounded(x * _all(LOG2E, x))
    rest = _fused(n, _all(-LN2_LOW, x), _fused(n, _all(-LN2_HIGH, x), x))
    total = _all(SERIES[0], x)
    for k in range(1, len(SERIES)):
        total = _fused(total, rest, _all(SERIES[k], x))
    return _scaled(total, n)


@_inline
def _sigmoids(z: Vector) -> tuple[Vector, Vector]:
    """Of z and of -z, each as accurate as the other."""
    zero, one = _all(0.0, z), _all(1.0, z)
    e = _exp(zero - _magnitude(z))
    larger = one / (one + e)
    smaller = e * larger
    return _where_less(z, zero, smaller, larger), _where_less(z, zero, larger, smaller)


@_inline
def _activated(q: _Task, z: Vector) -> Vector:
    """A NaN stays one."""
    zero, three, six = _all(0.0, z), _all(3.0, z), _all(6.0, z)
    if q.activation == RELU:
        return _where_less(z, zero, zero, z)
    if q.activation == RELU6:
        return _where_less(z, zero, zero, _where_less(six, z, six, z))
    if q.activation == LEAKY_RELU:
        return _where_less(zero, z, z, z * _all(q.slope, z))
    if q.activation == HARDSWISH:
        gate = z + three
        return z * (_where_less(gate, zero, zero, _where_less(six, gate, six, gate)) / six)
    if q.activation == IDENTITY:
        return z
    up, _ = _sigmoids(z)
    return z * up if q.activation == SILU else up


@_inline
def _differentiated(q: _Task, z: Vector, dy: Vector) -> Vector:
    """The gradient of z. At a kink the slope is that of its left side; at a NaN dy passes, unless a formula has it."""
    zero, one, three = _all(0.0, z), _all(1.0, z), _all(3.0, z)
    if q.activation == RELU:
        return _where_at_most(z, zero, zero, dy)
    if q.activation == RELU6:
        return _where_at_most(z, zero, zero, _where_at_most(three + three, z, zero, dy))
    if q.activation == LEAKY_RELU:
        return _where_less(zero, z, dy, dy * _all(q.slope, z))
    if q.activation == HARDSWISH:
        inside = dy * (z / three + _all(0.5, z))
        return _where_at_most(z, zero - three, zero, _where_less(z, three, inside, dy))
    if q.activation == IDENTITY:
        return dy
    up, down = _sigmoids(z)
    return dy * (up * (one + z * down) if q.activation == SILU else up * down)


@_inline
def _x_and_dz(p: _Plan, q: _Task, a: _Arrays, i: int, k: int) -> tuple[Vector, Vector]:
    x, dy = _load(a.x, i, p.size - i), _load(a.dy, i, p.size - i)
    if q.from_y:
        return _x_from_y(p, q, a, x, i, k), _differentiated(q, x, dy)
    if q.activation == IDENTITY:
        return x, dy
    return x, _differentiated(q, _preactivation(p, q, a, x, i, k), dy)


@_inline
def _dx(p: _Plan, q: _Task, a: _Arrays, x: Vector, dz: Vector, k: int, j: int) -> Vector:
    """The gradient of x. Where the mask, from j on, has False, x had no part in the statistics."""
    on_dy, postscale = _row(p, a, ON_DY, k, x), _row(p, a, POSTSCALE, k, x)
    if q.frozen:
        return on_dy * dz * postscale
    d = _fused(x, _row(p, a, PRESCALE, k, x), _row(p, a, NEG_MEAN, k, x))
    dx = _fused(_row(p, a, ON_X, k, x), d, _fused(on_dy, dz, _row(p, a, CONSTANT, k, x))) * postscale
    return _where_kept(a.kept, j, dx, on_dy * dz * postscale) if q.masked else dx


# ---- runs: n values that lie together, whose columns are from the first on ----


@_jit
def _reduce(p: _Plan, q: _Task, a: _Arrays, t: int, start: int, n: int) -> None:
    """Adds to each column x - origin and its square, or dz and its product with x - mean."""
    k = 0
    for i in range(start, start + n, p.lanes):
        left = start + n - i
        _fetch(a.x, i + AHEAD)
        if q.backward:
            _fetch(a.dy, i + AHEAD)
            x, dz = _x_and_dz(p, q, a, i, CONSTANTS * t * p.padded + k)
        else:
            x = dz = _load(a.x, i, p.size - i)
        d = _widened(x) - _get(a.origins, t * p.padded + k, x)
        if q.masked and not q.backward:
            d = _where_kept(a.kept, t * p.longest + i - start, d, _all(0.0, d))
        g = _widened(dz) if q.backward else d
        if left < p.lanes:
            d, g = _first(d, left), _first(g, left)
        at = 2 * t * p.padded + k
        _set(a.parts, at, _get(a.parts, at, x) + g)
        _set(a.parts, at + p.padded, _fused(g, d, _get(a.parts, at + p.padded, x)))
        k += p.lanes
        k -= p.columns if k >= p.columns else 0


@_inline
def _put(p: _Plan, out: Pointer, i: int, n: int, v: Vector, stream: bool) -> None:
    if n < p.lanes:
        _set_some(out, i, v, n)
    elif stream:
        _stream(out, i, v)
    else:
        _set(out, i, v)


@_jit
def _map(p: _Plan, q: _Task, a: _Arrays, t: int, start: int, n: int) -> None:
    """Fills out and dresidual by lines of out; around the cache, but for lines of which the run has only a part."""
    i, k, end = start, 0, start + n
    now = min(n, p.lanes - (_address(a.out) * p.lanes // LINE_BYTES + start) % p.lanes)
    alike = (_address(a.out) - _address(a.dresidual)) % LINE_BYTES == 0
    while i < end:
        at = CONSTANTS * t * p.padded + k
        _fetch(a.x, i + p.ahead)
        if q.adds:
            _fetch(a.residual, i + p.ahead)
        if q.backward:
            _fetch(a.dy, i + p.ahead)
            x, dz = _x_and_dz(p, q, a, i, at)
            result = _dx(p, q, a, x, dz, at, t * p.longest + i - start)
            if q.keeps:
                _put(p, a.dresidual, i, now, dz, q.stream and alike)
        else:
            result = _activated(q, _preactivation(p, q, a, _load(a.x, i, p.size - i), i, at))
        _put(p, a.out, i, now, result, q.stream)
        i += now
        k += now
        k -= p.columns if k >= p.columns else 0
        now = min(p.lanes, end - i)


@_jit
def _walk(maps: bool, p: _Plan, q: _Task, a: _Arrays, t: int, units: Range, strip: Range) -> None:
    """Reduces or maps a strip of channels of some units: in one run, where that is all of them."""
    masked = q.masked and maps == q.backward
    step = units[1] - units[0] if p.together and not masked else 1
    for unit in range(units[0], units[1], step):
        if p.rows:
            start = unit * p.width + strip[0] * p.inner
            n = min(step * p.width if p.together else (strip[1] - strip[0]) * p.inner, p.size - start)
        else:
            at = unit % p.cuts * p.cut
            start = (unit // p.cuts * p.channels + strip[0]) * p.inner + at
            n = min(p.cut, p.inner - at)
        if masked:
            _keep(p, a.mask, start, n, a.kept, t * p.longest)
        if maps:
            _map(p, q, a, t, start, n)
        else:
            _reduce(p, q, a, t, start, n)


# ---- constants, for some channels ----


@_jit
def _exponent(v: float) -> int:
    return math.frexp(v)[1] - 1 if v != 0 and math.isfinite(v) else 0


@_jit
def _limits(wide: bool) -> tuple[int, int]:
    """Exponents that none may pass, and up to which all are usual."""
    return (1016, 500) if wide else (120, 60)


@_jit
def _prescale(mean: float, inv_std: float, slope: float, wide: bool) -> float:
    """The power of two, 1 for usual channels, with which x - mean and slope / prescale stay in the exponent range."""
    most, usual = _limits(wide)
    spread, steep = _exponent(inv_std), _exponent(slope)
    e = 0 if -usual <= spread <= usual else spread
    if slope != 0:
        e = max(steep - most, min(e, steep + most))
    if mean != 0:
        e = min(e, most - _exponent(mean))
    return math.ldexp(1.0, max(-most, min(e, most)))


@_jit
def _postscale(slope: float, wide: bool) -> float:
    """The power of two, 1 for usual channels, that leaves the slope near 1."""
    most, usual = _limits(wide)
    e = _exponent(slope)
    return 1.0 if -usual <= e <= usual else math.ldexp(1.0, max(-most, min(e, most)))


@_jit
def _scale(slope: float, prescale: float, wide: bool) -> float:
    """Finite: where the exponents cannot all fit in, x is the mean or the result overflows; inf would give NaN."""
    most = 1.7976931348623157e308 if wide else 3.4028234663852886e38
    scale = slope / prescale
    return max(-most, min(scale, most)) if math.isfinite(scale) else scale


@_jit
def _mean_parts(saved: Array, constants: Array, c: int) -> tuple[float, float]:
    """The mean in the data's dtype, and what that lacks."""
    mean_hi = np.float64(constants.dtype.type(saved[MEAN, c]))
    return mean_hi, (saved[MEAN, c] - mean_hi) + saved[MEAN_LOW, c]


@_jit
def _set_line(saved: Array, constants: Array, channels: Range) -> None:
    """For y = ((x - mean_hi) - mean_lo) * inv_std * gamma + beta, where the term of mean_lo moves into the shift."""
    wide = constants.itemsize == 8
    for c in range(channels[0], channels[1]):
        slope = saved[INV_STD, c] * saved[GAMMA, c]
        prescale = _prescale(saved[MEAN, c], saved[INV_STD, c], slope, wide)
        mean_hi, mean_lo = _mean_parts(saved, constants, c)
        constants[PRESCALE, c] = prescale
        constants[NEG_MEAN, c] = -mean_hi * prescale
        constants[SCALE, c] = _scale(slope, prescale, wide)
        constants[SHIFT, c] = saved[BETA, c] - mean_lo * slope
        lost = (saved[BETA, c] - np.float64(constants[SHIFT, c])) - mean_lo * slope
        constants[SHIFT_LOW, c] = lost if lost == lost else 0.0  # beta may be infinite


@_jit
def _finish_forward(q: _Task, a: _Arrays, channels: Range) -> None:
    """Mean and variance of the batch, from sums about the origin; then the line."""
    saved = a.saved
    for c in range(channels[0], channels[1]):
        origin, offset = a.origin[0, c], a.totals[0, c] / q.count
        mean = origin + offset
        back = mean - origin
        lost = (origin - (mean - back)) + (offset - back)  # by the sum's rounding (Knuth's two-sum)
        m2 = a.totals[1, c] - a.totals[0, c] * offset
        var = (0.0 if m2 < 0 else m2) / q.count
        saved[MEAN, c], saved[MEAN_LOW, c], saved[VAR, c] = mean, lost if lost == lost else 0.0, var
        saved[INV_STD, c] = 0.0 if var + q.eps == 0 else 1 / math.sqrt(var + q.eps)
    _set_line(saved, a.constants, channels)


@_jit
def _finish_backward(q: _Task, a: _Arrays, channels: Range) -> None:
    """For dx = A dz + B (x - mean) + D: A = gamma/std, B = -A sum(dz xhat) / (M std), D = -A sum(dz) / M.

    That is Ioffe & Szegedy 2015, section 3, gathered by input. _dx has x - mean_hi, prescaled.
    """
    saved, constants = a.saved, a.constants
    for c in range(channels[0], channels[1]):
        inv_std = saved[INV_STD, c]
        if q.reduces:
            a.totals[1, c] = (a.totals[1, c] - a.totals[0, c] * saved[MEAN_LOW, c]) * inv_std
        slope = inv_std * saved[GAMMA, c]
        postscale = _postscale(slope, constants.itemsize == 8)
        on_dy = slope / postscale
        on_xhat = -a.totals[1, c] / q.count * on_dy
        _, mean_lo = _mean_parts(saved, constants, c)
        constants[ON_DY, c] = on_dy
        constants[ON_X, c] = on_xhat * (inv_std / np.float64(constants[PRESCALE, c]))
        constants[CONSTANT, c] = -on_dy * a.totals[0, c] / q.count - on_xhat * inv_std * mean_lo
        constants[POSTSCALE, c] = postscale


@_jit
def _finish(q: _Task, a: _Arrays, channels: Range) -> None:
    if q.reduces:
        for k in range(2):
            for segment in range(a.sums.shape[0]):
                for c in range(channels[0], channels[1]):
                    a.totals[k, c] = a.sums[segment, k, c] + (a.totals[k, c] if segment > 0 else 0.0)
    if q.backward:
        _finish_backward(q, a, channels)
    else:
        _finish_forward(q, a, channels)


# ---- threads ----


@_jit
def _share(steps: int, t: int, threads: int, p: _Plan, q: _Task, arrays: _Arrays) -> None:
    """Thread t's share: of the blocks of channels, or of one step on all of them."""
    if steps == FINISH and not p.by_channels:
        _finish(q, arrays, _part(p.channels, t, threads))
        return
    a = _pointers(arrays)
    blocks, segments, units = (0, p.blocks), (0, p.segments), (0, p.units)
    if p.by_channels:
        blocks = _part(p.blocks, t, threads)
    else:
        segments, units = _part(p.segments, t, threads), _part(p.units, t, threads)
    for block in range(blocks[0], blocks[1]):
        strip = block * p.block, min((block + 1) * p.block, p.channels)
        if steps & REDUCE:
            _spread(p, arrays.origin, 1, strip, a.origins, t * p.padded)
            if q.backward:
                _spread(p, arrays.constants, LINE, strip, a.lines, CONSTANTS * t * p.padded)
            base = 2 * t * p.padded
            for segment in range(segments[0], segments[1]):
                for i in range(base, base + 2 * p.padded):
                    a.parts[i] = 0.0
                first = segment * p.segment
                _walk(False, p, q, a, t, (first, min(first + p.segment, p.units)), strip)
                _fold(p, a.parts, base, strip, arrays.sums[segment])
        if steps & FINISH:
            _finish(q, arrays, strip)
        if steps & MAP:
            rows = CONSTANTS if q.backward else LINE
            _spread(p, arrays.constants, rows, strip, a.lines, CONSTANTS * t * p.padded)
            for end in range(units[1], units[0], -p.stretch):  # what was summed last is still in the cache
                _walk(True, p, q, a, t, (max(units[0], end - p.stretch), end), strip)
    if steps & MAP and q.stream:
        _fence()


@_parallel
def _shares(steps: int, threads: int, p: _Plan, q: _Task, a: _Arrays) -> None:
    for t in prange(threads):
        _share(steps, np.intp(t), threads, p, q, a)


_one_at_a_time = threading.Lock()


def _layer() -> str | None:
    """Numba's threading layer, which is chosen at the first parallel call."""
    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined]
    except ValueError:
        return None


def _most_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def _in_parallel(steps: int, threads: int, *arguments: Any) -> None:
    """Numba's workqueue layer cannot take two callers at once; the others can."""
    with nullcontext() if _layer() in ("tbb", "omp") else _one_at_a_time:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            _shares(steps, threads, *arguments)
        finally:
            numba.set_num_threads(before)


# ---- the verbs ----


def _input(array: Array) -> Array:
    """As compiled code takes it: flat, and always read-only, since that is part of the type."""
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


def _buffer(size: int, dtype: Any) -> Array:
    """An array that begins with a line of the cache."""
    room = np.empty(size + LINE_BYTES, dtype)
    skip = -room.ctypes.data % LINE_BYTES // room.itemsize
    return room[skip : skip + size]


def _calculate(
    steps: int,
    x: Array,
    saved: Array,
    *,
    origin: Array,
    residual: Array | None = None,
    dy: Array | None = None,
    mask: Array | None = None,
    out: Array | None = None,
    dresidual: Array | None = None,
    sums: Array | None = None,
    count: float = 1,
    eps: float = 0,
    activation: int = IDENTITY,
    slope: float = 0,
    frozen: bool = False,
    from_y: bool = False,
    threads: int,
) -> Array:
    """Does the steps: all at once where a thread has its channels to itself, else one after the other.

    Returns `sums`, (2, channels), or those that it takes itself.
    """
    threads = 1 if _threads.in_forked_child() else max(1, min(threads, x.size // WORK_PER_THREAD, _most_threads()))
    p = _plan(x.shape, x.itemsize, threads)
    q = _Task(
        activation=int(activation),
        slope=float(slope),
        eps=float(eps),
        count=float(count),
        backward=dy is not None,
        adds=residual is not None,
        keeps=dresidual is not None,
        masked=mask is not None,
        frozen=bool(frozen),
        from_y=bool(from_y),
        reduces=bool(steps & REDUCE),
        stream=x.nbytes > STREAM_BYTES,
    )
    flat, target = _input(x), np.empty(0, x.dtype) if out is None else out.reshape(-1)
    a = _Arrays(
        x=flat,
        residual=flat if residual is None else _input(residual),
        dy=flat if dy is None else _input(dy),
        mask=_input((np.empty(0, np.bool_) if mask is None else mask).view(np.uint8)),
        out=target,
        dresidual=target if dresidual is None else dresidual.reshape(-1),
        origin=origin.reshape(1, -1),
        sums=np.empty((p.segments, 2, p.channels)),
        totals=np.zeros((2, p.channels)) if sums is None else sums,
        saved=saved,
        constants=np.empty((CONSTANTS, p.channels), x.dtype),
        lines=_buffer(threads * CONSTANTS * p.padded, x.dtype),
        origins=_buffer(threads * p.padded, np.float64),
        parts=_buffer(threads * 2 * p.padded, np.float64),
        kept=np.empty(threads * p.longest if q.masked else 0, np.uint8),
    )
    if q.backward or not steps & FINISH:
        _set_line(saved, a.constants, (0, p.channels))
    for some in (steps,) if p.by_channels else (step for step in (REDUCE, FINISH, MAP) if step & steps):
        if threads > 1:
            _in_parallel(some, threads, p, q, a)
        else:
            _share(some, 0, 1, p, q, a)
    return a.totals


def _origin(x: Array, mask: Array | None) -> Array:
    """The origin of each channel's sums: the median of three of its values, so that one outlier does not matter."""
    outer, _, inner = x.shape
    if mask is None:
        positions = np.array([0, (outer // 2) * inner + inner // 2, outer * inner - 1])
    else:
        true = np.flatnonzero(mask)
        positions = true[[0, true.size // 2, -1]]
    a, b, d = (x[position // inner, :, position % inner] for position in positions)
    median = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), d)).astype(np.float64)
    return np.where(np.isfinite(median), median, 0)


def _count(x: Array, mask: Array | None) -> int:
    return x.shape[0] * x.shape[2] if mask is None else int(np.count_nonzero(mask))


def _save_parameters(saved: Array, gamma: Array | None, beta: Array | None) -> None:
    saved[GAMMA] = 1 if gamma is None else gamma
    saved[BETA] = 0 if beta is None else beta


@np.errstate(all="ignore")
def forward(
    x: Array,
    residual: Array | None,
    mask: Array | None,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    correction: int,
    eps: float,
    activation: int,
    slope: float,
    y: Array,
    saved: Array,
    threads: int,
) -> None:
    """fbn_forward of src_c/fastbn.h."""
    if not x.size:
        return
    count = _count(x, mask)
    _save_parameters(saved, gamma, beta)
    _calculate(
        REDUCE | FINISH | MAP, x, saved, origin=_origin(x, mask), residual=residual, mask=mask, out=y,
        count=count, eps=eps, activation=activation, slope=slope, threads=threads,
    )  # fmt: skip
    if running_mean is not None and running_var is not None:
        unbiased = saved[VAR] * (count / (count - correction))
        running_mean[...] = (1 - momentum) * running_mean + momentum * saved[MEAN]
        running_var[...] = (1 - momentum) * running_var + momentum * unbiased


@np.errstate(all="ignore")
def infer(
    x: Array,
    residual: Array | None,
    gamma: Array | None,
    beta: Array | None,
    mean: Array | None,
    var: Array | None,
    eps: float,
    activation: int,
    slope: float,
    y: Array,
    saved: Array | None,
    threads: int,
) -> None:
    """fbn_infer of src_c/fastbn.h."""
    known = np.empty((len(SAVED_ROWS), x.shape[1])) if saved is None else saved
    if mean is not None:
        known[MEAN], known[MEAN_LOW], known[VAR] = mean, 0, var
    std = np.sqrt(known[VAR] + eps)
    known[INV_STD] = np.where(std == 0, 0, 1 / std)
    _save_parameters(known, gamma, beta)
    if x.size:
        _calculate(
            MAP, x, known, origin=known[MEAN], residual=residual, out=y,
            activation=activation, slope=slope, threads=threads,
        )  # fmt: skip


@np.errstate(all="ignore")
def moments(x: Array, mask: Array | None, into: Array, threads: int) -> None:
    """fbn_moments of src_c/fastbn.h."""
    count, saved = _count(x, mask), np.zeros((len(SAVED_ROWS), x.shape[1]))
    if x.size:
        _calculate(REDUCE | FINISH, x, saved, origin=_origin(x, mask), mask=mask, count=count, threads=threads)
    into[:2], into[2] = saved[[MEAN, MEAN_LOW]], saved[VAR] * count


def _known(saved: Array, from_y: bool) -> Array:
    """What a backward call knows of its channels. With from_y it finds x - mean, in which no mean is left."""
    known = saved.copy()
    if from_y:
        known[[MEAN, MEAN_LOW]] = 0
    return known


@np.errstate(all="ignore")
def backward_sums(
    dy: Array,
    x: Array,
    residual: Array | None,
    saved: Array,
    activation: int,
    slope: float,
    from_y: bool,
    sums: Array,
    threads: int,
) -> None:
    """fbn_backward_sums of src_c/fastbn.h."""
    known = _known(saved, from_y)
    sums[...] = 0
    if x.size:
        sums[...] = _calculate(
            REDUCE | FINISH, x, known, origin=known[MEAN], residual=residual, dy=dy,
            activation=activation, slope=slope, from_y=from_y, threads=threads,
        )  # fmt: skip


@np.errstate(all="ignore")
def backward(
    dy: Array,
    x: Array,
    residual: Array | None,
    mask: Array | None,
    saved: Array,
    count: float,
    frozen: bool,
    sums: Array | None,
    activation: int,
    slope: float,
    from_y: bool,
    dx: Array,
    dresidual: Array | None,
    dgamma: Array | None,
    dbeta: Array | None,
    threads: int,
) -> None:
    """fbn_backward of src_c/fastbn.h."""
    known = _known(saved, from_y)
    reduces = sums is None and (not frozen or dgamma is not None or dbeta is not None)
    totals = np.zeros((2, x.shape[1])) if sums is None else np.array(sums)
    if x.size:
        _calculate(
            (REDUCE if reduces else 0) | FINISH | MAP, x, known, origin=known[MEAN], residual=residual, dy=dy,
            mask=mask, out=dx, dresidual=dresidual, sums=totals, count=count,
            activation=activation, slope=slope, frozen=frozen, from_y=from_y, threads=threads,
        )  # fmt: skip
    if dgamma is not None:
        dgamma[...] = totals[1]
    if dbeta is not None:
        dbeta[...] = totals[0]


def describe() -> dict[str, str]:
    """For show_config()."""
    return {
        "version": numba.__version__,
        "threading layer": _layer() or "not started",
        "most threads": str(_most_threads()),
    }
