"""How does Numba compute batch norm? The algorithm of the C core (src_c), compiled on first use and kept on disk.

Compiled code takes sums over channels and maps x to y, or dy and x to dx; NumPy makes the channels' constants between
the two. The sums of a channel are taken by segments, whose bounds follow from the shape alone and which one thread
does from end to end; they are added in one order. So the number of threads does not change a bit.

In compiled code the data is flat. Innermost loops have unsigned indices, which cannot count from the end, so that they
become vector code; unsigned and signed integers never meet, since Numba would make a float of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import _config
from .._activations import Activation
from . import SAVED_ROWS

Array = np.ndarray[Any, Any]
Real = Any  # a float of the data's dtype
Line = tuple[Real, ...]
Range = tuple[int, int]

SEGMENT = 32768  # values of a channel that a channels-first segment has at least, and a cut of a plane
SEGMENT_ROWS = 128  # rows that a channels-last segment has at least,
SEGMENTS_MOST = 64  # and how many of these there are at most
WIDE = 512  # values that a unit of rows has at least: short loops spend their time beginning and ending
GROUP_BYTES = 1 << 24  # of the channels that are summed and then mapped, while the last-level cache has them
STREAM_BYTES = 1 << 24  # of a result that is written around the cache
CHUNK = 2048  # values that a map leaves in a buffer before they are put in their place
CACHE_LINE = 64
WORK_PER_THREAD = 32768  # values that are worth waking a thread for

RELU = int(Activation.RELU)
MEAN, MEAN_LOW, VAR, INV_STD, GAMMA, BETA = range(len(SAVED_ROWS))
PRESCALE, NEG_MEAN, SCALE, SHIFT, SHIFT_LOW, ON_DY, ON_X, CONSTANT = range(8)
ZERO = np.float32(0)  # compares with float32 and float64 as it is


def _compiled(*fastmath: str, **options: bool) -> Callable[[Callable[..., Any]], Any]:
    """The decorator of every compiled function. a * b + c may be fused; division by zero gives inf."""
    decorator: Any = numba.njit
    compiled: Callable[[Callable[..., Any]], Any] = decorator(
        nogil=True, cache=True, error_model="numpy", fastmath={"contract", *fastmath}, **options
    )
    return compiled


_jit = _compiled()
_inline = _compiled(forceinline=True)
_parallel = _compiled(parallel=True)
# For functions that do nothing but add up float64 values which others made: in any order, hence by vectors.
_sum = _compiled("reassoc")


# ---- how a call is split ----


class _Plan(NamedTuple):
    """What to do, and how it is split. A unit is a run of rows (channels-last), or a cut of a plane (channels-first)."""

    rows: bool  # channels-last
    channels: int
    inner: int
    width: int  # of a unit of rows, and of the per-channel arrays, in which channels then recur
    cut: int  # values in a cut of a plane, which may be all of it
    cuts: int  # cuts in a plane
    units: int
    segment: int  # units in a segment
    segments: int
    group: int  # channels in a group
    activation: int
    adds: bool  # a residual
    keeps: bool  # its gradient
    frozen: bool
    buffers: bool  # results go through a buffer,
    streams: bool  # and from there around the cache


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=256)
def _split(outer: int, channels: int, inner: int, itemsize: int) -> tuple[int, ...]:
    """The first ten of a plan."""
    rows = inner == 1
    repeats = max(1, WIDE // channels) if rows else 1
    cut = inner if inner <= 2 * SEGMENT else SEGMENT
    cuts = _divide_up(inner, cut)
    units = _divide_up(outer * cuts, repeats)
    if rows:
        segment, group = max(SEGMENT_ROWS // repeats, _divide_up(units, SEGMENTS_MOST), 1), channels
    else:
        segment, group = max(1, SEGMENT // cut), max(1, GROUP_BYTES // (outer * inner * itemsize))
    return rows, channels, inner, channels * repeats, cut, cuts, units, segment, _divide_up(units, segment), group


@_jit
def _part(parts: int, group: Range, t: int, threads: int) -> Range:
    """Thread t's part of all pairs of a part (a segment or a unit) and a channel of the group, numbered in order."""
    pairs = parts * (group[1] - group[0])
    return pairs * t // threads, pairs * (t + 1) // threads


@_jit
def _parts_of(pairs: Range, group: Range) -> Range:
    channels = group[1] - group[0]
    return pairs[0] // channels, (pairs[1] + channels - 1) // channels


@_jit
def _channels_of(pairs: Range, group: Range, part: int) -> Range:
    before = part * (group[1] - group[0]) - group[0]
    return max(group[0], pairs[0] - before), min(group[1], pairs[1] - before)


@_jit
def _plane(p: _Plan, unit: int, c: int) -> Range:
    """Where channel c of a unit begins, and how many values it has (channels-first)."""
    at = unit % p.cuts * p.cut
    return (unit // p.cuts * p.channels + c) * p.inner + at, min(p.cut, p.inner - at)


# ---- one element ----


@_inline
def _line(constants: Array, c: int) -> Line:
    k = constants
    return k[PRESCALE, c], k[NEG_MEAN, c], k[SCALE, c], k[SHIFT, c], k[SHIFT_LOW, c]


@_inline
def _slopes(constants: Array, c: int) -> Line:
    return constants[ON_DY, c], constants[ON_X, c], constants[CONSTANT, c]


@_inline
def _deviation(x: Real, origin: float) -> float:
    return np.float64(x) - origin


@_inline
def _preactivation(p: _Plan, x: Real, residual: Real, line: Line) -> Real:
    """What the activation gets.

    x - mean_hi is exact where x is near the mean, whatever the offset. A residual may cancel the shift, so their sum
    keeps what its rounding loses (Knuth's two-sum); where the sum is infinite there is nothing to keep.
    """
    prescale, neg_mean, scale, shift, shift_low = line
    d = x * prescale + neg_mean
    if not p.adds:
        return d * scale + shift
    total = shift + residual
    back = total - shift
    lost = ((shift - (total - back)) + (residual - back)) + shift_low
    return (d * scale + total) + (lost if lost == lost else ZERO)


@_inline
def _y(p: _Plan, x: Real, residual: Real, line: Line) -> Real:
    z = _preactivation(p, x, residual, line)
    return ZERO if p.activation == RELU and z < ZERO else z


@_inline
def _dz(p: _Plan, dy: Real, x: Real, residual: Real, line: Line) -> Real:
    """The gradient of what the activation got."""
    return ZERO if p.activation == RELU and _preactivation(p, x, residual, line) <= ZERO else dy


@_inline
def _dx(p: _Plan, dz: Real, x: Real, line: Line, slopes: Line) -> Real:
    on_dy, on_x, constant = slopes
    if p.frozen:
        return on_dy * dz
    return on_x * (x * line[PRESCALE] + line[NEG_MEAN]) + (on_dy * dz + constant)


# ---- sums ----


@_sum
def _sum_plane(x: Array, start: int, n: int, origin: float) -> tuple[float, float]:
    total = squares = 0.0
    for i in range(np.uintp(start), np.uintp(start + n)):
        d = _deviation(x[i], origin)
        total += d
        squares += d * d
    return total, squares


@_jit
def _sum_row(x: Array, start: int, n: int, origin: Array, sums: Array) -> None:
    base = np.uintp(start)
    for c in range(np.uintp(n)):
        d = _deviation(x[base + c], origin[c])
        sums[0, c] += d
        sums[1, c] += d * d


@_jit
def _sum_forward(t: int, threads: int, p: _Plan, group: Range, x: Array, origin: Array, sums: Array) -> None:
    """The sums of x - origin and of its square."""
    pairs = _part(p.segments, group, t, threads)
    first, last = _parts_of(pairs, group)
    for s in range(first, last):
        c0, c1 = _channels_of(pairs, group, s)
        own = sums[s]
        for unit in range(s * p.segment, min((s + 1) * p.segment, p.units)):
            if p.rows:
                start = unit * p.width
                _sum_row(x, start, min(p.width, x.size - start), origin, own)
            else:
                for c in range(c0, c1):
                    start, n = _plane(p, unit, c)
                    total, squares = _sum_plane(x, start, n, origin[c])
                    own[0, c] += total
                    own[1, c] += squares


@_sum
def _sum_grad_plane(
    p: _Plan, dy: Array, x: Array, residual: Array, start: int, n: int, line: Line, mean: float
) -> tuple[float, float]:
    total = products = 0.0
    for i in range(np.uintp(start), np.uintp(start + n)):
        dz = np.float64(_dz(p, dy[i], x[i], residual[i], line))
        total += dz
        products += dz * _deviation(x[i], mean)
    return total, products


@_jit
def _sum_grad_row(
    p: _Plan, dy: Array, x: Array, residual: Array, start: int, n: int, constants: Array, mean: Array, sums: Array
) -> None:
    base = np.uintp(start)
    for c in range(np.uintp(n)):
        i = base + c
        dz = np.float64(_dz(p, dy[i], x[i], residual[i], _line(constants, c)))
        sums[0, c] += dz
        sums[1, c] += dz * _deviation(x[i], mean[c])


@_jit
def _sum_backward(
    t: int, threads: int, p: _Plan, group: Range, dy: Array, x: Array, residual: Array, mean: Array, constants: Array, sums: Array
) -> None:  # fmt: skip
    """The sums of dz and of dz * (x - mean)."""
    pairs = _part(p.segments, group, t, threads)
    first, last = _parts_of(pairs, group)
    for s in range(first, last):
        c0, c1 = _channels_of(pairs, group, s)
        own = sums[s]
        for unit in range(s * p.segment, min((s + 1) * p.segment, p.units)):
            if p.rows:
                start = unit * p.width
                _sum_grad_row(p, dy, x, residual, start, min(p.width, x.size - start), constants, mean, own)
            else:
                for c in range(c0, c1):
                    start, n = _plane(p, unit, c)
                    total, products = _sum_grad_plane(p, dy, x, residual, start, n, _line(constants, c), mean[c])
                    own[0, c] += total
                    own[1, c] += products


# ---- maps, from the end backwards, which begins with what the sums have just left in the cache ----


@intrinsic
def _put(typing: Any, buffer: Any, n: Any, out: Any, start: Any, around: Any) -> Any:
    """out[start : start + n] = buffer[:n]. `around`: whole cache lines are written around the cache."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[2]
        count, word = args[1], args[1].type
        source = context.make_array(signature.args[0])(context, builder, args[0]).data
        target = builder.gep(context.make_array(kind)(context, builder, args[2]).data, [args[3]])
        real = context.get_data_type(kind.dtype)
        item = context.get_abi_sizeof(real)
        lanes = CACHE_LINE // item
        line = ir.VectorType(real, lanes).as_pointer()

        def copy(first: Any, last: Any) -> None:
            size = builder.mul(builder.sub(last, first), word(item))
            cgutils.raw_memcpy(builder, builder.gep(target, [first]), builder.gep(source, [first]), size, 1)

        with builder.if_else(args[4]) as (around_cache, through_cache):
            with around_cache:
                to_line = builder.and_(builder.neg(builder.ptrtoint(target, word)), word(CACHE_LINE - 1))
                head = builder.udiv(to_line, word(item))
                head = builder.select(builder.icmp_signed("<", head, count), head, count)
                lines = builder.udiv(builder.sub(count, head), word(lanes))
                copy(word(0), head)
                with cgutils.for_range(builder, lines) as loop:
                    at = [builder.add(head, builder.mul(loop.index, word(lanes)))]
                    value = builder.load(builder.bitcast(builder.gep(source, at), line), align=item)
                    store = builder.store(value, builder.bitcast(builder.gep(target, at), line), align=CACHE_LINE)
                    store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
                copy(builder.add(head, builder.mul(lines, word(lanes))), count)
            with through_cache:
                copy(word(0), count)
        return context.get_dummy_value()

    return types.void(buffer, types.intp, out, types.intp, types.boolean), generate


@intrinsic
def _fence(typing: Any) -> Any:
    """Orders what was written around the cache before what follows."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@_jit
def _map_plane(p: _Plan, x: Array, residual: Array, start: int, n: int, line: Line, to: Array, at: int) -> None:
    first, out = np.uintp(start), np.uintp(at)
    for i in range(np.uintp(n)):
        to[out + i] = _y(p, x[first + i], residual[first + i], line)


@_jit
def _map_row(p: _Plan, x: Array, residual: Array, start: int, n: int, constants: Array, c: int, to: Array) -> None:
    first, channel = np.uintp(start), np.uintp(c)
    for i in range(np.uintp(n)):
        to[i] = _y(p, x[first + i], residual[first + i], _line(constants, channel + i))


@_jit
def _map_forward(
    t: int, threads: int, p: _Plan, group: Range, x: Array, residual: Array, constants: Array, y: Array
) -> None:
    buffer = np.empty(CHUNK, y.dtype)
    pairs = _part(p.units, group, t, threads)
    first, last = _parts_of(pairs, group)
    together = max(1, CHUNK // p.cut)
    for unit in range(last - 1, first - 1, -1):
        if p.rows:
            base = unit * p.width
            for c in range(0, min(p.width, x.size - base), CHUNK):
                n = min(CHUNK, min(p.width, x.size - base) - c)
                _map_row(p, x, residual, base + c, n, constants, c, buffer)
                _put(buffer, n, y, base + c, p.streams)
        else:
            c0, c1 = _channels_of(pairs, group, unit)
            for c in range(c0, c1, together):
                planes = min(together, c1 - c)
                base, length = _plane(p, unit, c)
                for at in range(0, length, CHUNK):
                    n = min(CHUNK, length - at)
                    for k in range(planes):
                        _map_plane(p, x, residual, base + at + k * n, n, _line(constants, c + k), buffer, k * n)
                    _put(buffer, planes * n, y, base + at, p.streams)
    if p.streams:
        _fence()
