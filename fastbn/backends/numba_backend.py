"""How does Numba compute batch norm? The algorithm of the C core (src_c), compiled on first use and kept on disk.

A call reduces (sums over each channel), finishes (a channel's constants from its sums) and maps (y or dx from the
constants). Where a block of channels fits in a core's cache, one thread does all three on it. Otherwise all threads
reduce, then finish, then map, from the end backwards: the end is what the cache still holds.

The sums of a channel are taken by segments, whose bounds follow from the shape alone, and segments are added in order.
So neither the blocking nor the number of threads changes a bit.

In compiled code the data is flat. Innermost loops have unsigned indices, which cannot count from the end, so that they
become vector code; unsigned and signed integers never meet, since Numba would make a float of them.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import prange
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
BLOCK_CHANNELS = 64  # channels that a channels-first block has at most
BLOCK_ROW = 256  # channels that a channels-last block has at least
BLOCK_BYTES = 1 << 19  # of a block: half of a common level 2 cache
STRETCH = 32  # units that a map takes in order, before it turns to those in front of them
WORK_PER_THREAD = 32768  # values that are worth waking a thread for

REDUCE, FINISH, MAP = 1, 2, 4
RELU = int(Activation.RELU)
MEAN, MEAN_LOW, VAR, INV_STD, GAMMA, BETA = range(len(SAVED_ROWS))
PRESCALE, NEG_MEAN, SCALE, SHIFT, SHIFT_LOW, ON_DY, ON_X, CONSTANT, POSTSCALE = range(9)
ZERO = np.float32(0)  # compares with float32 and float64 as it is


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
# For functions that do nothing but add up float64 values which others made: in any order, hence by vectors.
_sum = _compiled("reassoc", "contract")


# ---- what compiled code is told ----


class _Plan(NamedTuple):
    """What to do, and how it is split. A unit is a run of rows (channels-last) or a cut of a plane (channels-first)."""

    """How a call is split. A unit is a run of rows (channels-last), or a cut of a plane (channels-first)."""
    rows: bool  # channels-last
    channels: int
    values: int  # per channel
    inner: int
    width: int  # of a unit of rows, and of the per-channel arrays, in which channels then recur
    cut: int  # values in a cut of a plane, which may be all of it
    cuts: int  # cuts in a plane
    units: int
    segment: int  # units in a segment
    segments: int
    block: int  # channels in a block
    blocks: int
    by_channels: bool  # a thread does all steps on a block
    activation: int
    adds: bool  # a residual
    keeps: bool  # its gradient
    frozen: bool


class _Arrays(NamedTuple):
    """The arrays of one call. Where there is no residual or dresidual, another array stands there unused."""

    x: Array
    residual: Array
    out: Array  # y or dx
    dresidual: Array
    origin: Array  # (width,), of the sums; the mean in a backward call
    sums: Array  # (segments, 2, width), float64; zeros at first
    saved: Array  # (6, channels)
    constants: Array  # (8, width), in the data's dtype


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=256)
def _plan(shape: tuple[int, ...], itemsize: int, threads: int, *flags: Any) -> _Plan:
    outer, channels, inner = shape
    rows = inner == 1
    repeats = max(1, WIDE // channels) if rows else 1
    cut = inner if inner <= 2 * SEGMENT else SEGMENT
    cuts = _divide_up(inner, cut)
    units = _divide_up(outer * cuts, repeats)
    share, fit = _divide_up(channels, threads), BLOCK_BYTES // (outer * inner * itemsize)
    if rows:
        segment = max(SEGMENT_ROWS // repeats, _divide_up(units, SEGMENTS_MOST))
        block = min(share, fit)
        worth = repeats == 1 and block >= BLOCK_ROW
    else:
        segment = max(1, SEGMENT // cut)
        block = max(1, min(share, fit, BLOCK_CHANNELS)) if cuts == 1 else 1
        worth = True
    blocks, segments = _divide_up(channels, max(1, block)), _divide_up(units, segment)
    by_channels = worth and 5 * _divide_up(blocks, threads) * threads <= 7 * blocks
    return _Plan(
        rows,
        channels,
        outer * inner,
        inner,
        channels * repeats,
        cut,
        cuts,
        units,
        segment,
        segments,
        block,
        blocks,
        by_channels,
        *flags,
    )


@_jit
def _part(n: int, t: int, threads: int) -> Range:
    """Thread t's part of range(n)."""
    return n * t // threads, n * (t + 1) // threads


@_jit
def _tiles(p: _Plan, t: int, threads: int) -> Range:
    """The tiles that thread t works on, one after the other: its blocks of channels, or one of its own."""
    return _part(p.blocks, t, threads) if p.by_channels else (t, t + 1)


@_jit
def _tile(p: _Plan, tile: int, threads: int) -> tuple[Range, Range, Range, Range]:
    """The segments, units and channels of a tile; and the channels that are finished with it."""
    if p.by_channels:
        channels = tile * p.block, min((tile + 1) * p.block, p.channels)
        return (0, p.segments), (0, p.units), channels, channels
    finished = _part(p.channels, tile, threads)
    return _part(p.segments, tile, threads), _part(p.units, tile, threads), (0, p.width), finished


@_jit
def _plane(p: _Plan, unit: int, c: int) -> Range:
    """Where channel c of a unit begins, and how many values it has (channels-first)."""
    at = unit % p.cuts * p.cut
    return (unit // p.cuts * p.channels + c) * p.inner + at, min(p.cut, p.inner - at)


@_jit
def _row(p: _Plan, size: int, unit: int, channels: Range) -> Range:
    """Where a unit's part of the channels begins, and how many values it has (channels-last)."""
    base = unit * p.width
    return base + channels[0], min(channels[1], size - base) - channels[0]


# ---- one element ----


@_inline
def _line(constants: Array, c: int) -> Line:
    k = constants
    return k[PRESCALE, c], k[NEG_MEAN, c], k[SCALE, c], k[SHIFT, c], k[SHIFT_LOW, c]


@_inline
def _slopes(constants: Array, c: int) -> Line:
    return constants[ON_DY, c], constants[ON_X, c], constants[CONSTANT, c], constants[POSTSCALE, c]


def _make_fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """The sum a * b + c, rounded once where the processor can.

    "contract" would leave it to the place whether that is done, and forward and backward would not see the same z.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        real = arguments[0].type
        operation = builder.module.declare_intrinsic("llvm.fmuladd", [real], ir.FunctionType(real, [real] * 3))
        return builder.call(operation, arguments)

    return a(a, a, a), generate


_fused: Any = intrinsic(_make_fused)


@_inline
def _deviation(x: Real, origin: float) -> Real:
    return np.float64(x) - origin


@_inline
def _preactivation(p: _Plan, x: Real, residual: Real, line: Line) -> Real:
    """What the activation gets.

    x - mean_hi is exact where x is near the mean, whatever the offset. shift_low is what shift lost to rounding: it is
    added last, since y is near the shift where it matters. A residual may cancel the shift, so their sum
    keeps what its rounding loses (Knuth's two-sum); where the sum is infinite there is nothing to keep.
    """
    prescale, neg_mean, scale, shift, shift_low = line
    d = _fused(x, prescale, neg_mean)
    if not p.adds:
        return _fused(d, scale, shift) + shift_low
    total = shift + residual
    back = total - shift
    lost = ((shift - (total - back)) + (residual - back)) + shift_low
    return _fused(d, scale, total) + (lost if lost == lost else ZERO)


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
    on_dy, on_x, constant, postscale = slopes
    if p.frozen:
        return on_dy * dz * postscale
    return _fused(on_x, _fused(x, line[PRESCALE], line[NEG_MEAN]), _fused(on_dy, dz, constant)) * postscale


# ---- sums: of n values of one channel, or of n channels one value each; then of segments ----


@_sum
def _sum_plane(x: Array, start: int, n: int, origin: float) -> tuple[float, float]:
    """Of x - origin and of its square."""
    total = squares = 0.0
    for i in range(np.uintp(start), np.uintp(start + n)):
        d = _deviation(x[i], origin)
        total += d
        squares += d * d
    return total, squares


@_jit
def _sum_row(x: Array, start: int, n: int, c: int, origin: Array, sums: Array) -> None:
    first, channel = np.uintp(start), np.uintp(c)
    for i in range(np.uintp(n)):
        k = channel + i
        d = _deviation(x[first + i], origin[k])
        sums[0, k] += d
        sums[1, k] = _fused(d, d, sums[1, k])


@_sum
def _sum_grad_plane(
    p: _Plan, dy: Array, x: Array, residual: Array, start: int, n: int, line: Line, mean: float
) -> tuple[float, float]:
    """Of dz and of dz * (x - mean)."""
    total = products = 0.0
    for i in range(np.uintp(start), np.uintp(start + n)):
        dz = np.float64(_dz(p, dy[i], x[i], residual[i], line))
        total += dz
        products += dz * _deviation(x[i], mean)
    return total, products


@_jit
def _sum_grad_row(
    p: _Plan, dy: Array, x: Array, residual: Array, start: int, n: int, c: int, line: Array, mean: Array, sums: Array
) -> None:
    first, channel = np.uintp(start), np.uintp(c)
    for i in range(np.uintp(n)):
        at, k = first + i, channel + i
        dz = np.float64(_dz(p, dy[at], x[at], residual[at], _line(line, k)))
        sums[0, k] += dz
        sums[1, k] = _fused(dz, _deviation(x[at], mean[k]), sums[1, k])


@_jit
def _reduce(p: _Plan, a: _Arrays, dy: Array | None, segments: Range, channels: Range) -> None:
    x, residual, origin, line = a.x, a.residual, a.origin, a.constants
    for s in range(segments[0], segments[1]):
        sums = a.sums[s]
        for unit in range(s * p.segment, min((s + 1) * p.segment, p.units)):
            if p.rows:
                start, n = _row(p, x.size, unit, channels)
                if dy is None:
                    _sum_row(x, start, n, channels[0], origin, sums)
                else:
                    _sum_grad_row(p, dy, x, residual, start, n, channels[0], line, origin, sums)
                continue
            for c in range(channels[0], channels[1]):
                start, n = _plane(p, unit, c)
                if dy is None:
                    first, second = _sum_plane(x, start, n, origin[c])
                else:
                    first, second = _sum_grad_plane(p, dy, x, residual, start, n, _line(line, c), origin[c])
                sums[0, c] += first
                sums[1, c] += second


@_jit
def _total(p: _Plan, sums: Array, channels: Range) -> None:
    """Adds the sums up in the first place: in each segment as a channel recurs, then segment by segment."""
    for s in range(p.segments):
        for k in range(2):
            for first in range(p.channels, p.width, p.channels):
                for c in range(channels[0], channels[1]):
                    sums[s, k, c] += sums[s, k, first + c]
            if s > 0:
                for c in range(channels[0], channels[1]):
                    sums[0, k, c] += sums[s, k, c]


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
    for c in range(channels[0], channels[1]):
        wide = constants.itemsize == 8
        slope = saved[INV_STD, c] * saved[GAMMA, c]
        prescale = _prescale(saved[MEAN, c], saved[INV_STD, c], slope, wide)
        mean_hi, mean_lo = _mean_parts(saved, constants, c)
        for at in range(c, constants.shape[1], saved.shape[1]):
            constants[PRESCALE, at] = prescale
            constants[NEG_MEAN, at] = -mean_hi * prescale
            constants[SCALE, at] = _scale(slope, prescale, wide)
            constants[SHIFT, at] = saved[BETA, c] - mean_lo * slope
            lost = (saved[BETA, c] - np.float64(constants[SHIFT, at])) - mean_lo * slope
            constants[SHIFT_LOW, at] = lost if lost == lost else 0.0  # beta may be infinite


@_jit
def _finish_forward(p: _Plan, a: _Arrays, eps: float, channels: Range) -> None:
    """Mean and variance of the batch, from sums about the origin; then the line."""
    saved, sums = a.saved, a.sums
    _total(p, sums, channels)
    for c in range(channels[0], channels[1]):
        origin, offset = a.origin[c], sums[0, 0, c] / p.values
        mean = origin + offset
        back = mean - origin
        lost = (origin - (mean - back)) + (offset - back)  # by the sum's rounding (Knuth's two-sum)
        m2 = sums[0, 1, c] - sums[0, 0, c] * offset
        var = (0.0 if m2 < 0 else m2) / p.values
        saved[MEAN, c], saved[MEAN_LOW, c], saved[VAR, c] = mean, lost if lost == lost else 0.0, var
        saved[INV_STD, c] = 0.0 if var + eps == 0 else 1 / math.sqrt(var + eps)
    _set_line(saved, a.constants, channels)


@_jit
def _finish_backward(p: _Plan, a: _Arrays, channels: Range) -> None:
    """For dx = A dz + B (x - mean) + D: A = gamma/std, B = -A sum(dz (x - mean)) / (M var), D = -A sum(dz) / M.

    That is Ioffe & Szegedy 2015, section 3, gathered by input. _dx has x - mean_hi, prescaled.
    """
    saved, sums, constants = a.saved, a.sums, a.constants
    _total(p, sums, channels)
    for c in range(channels[0], channels[1]):
        sums[0, 1, c] -= sums[0, 0, c] * saved[MEAN_LOW, c]
        inv_std = saved[INV_STD, c]
        slope = inv_std * saved[GAMMA, c]
        postscale = _postscale(slope, constants.itemsize == 8)
        on_dy = slope / postscale
        on_xhat = -(sums[0, 1, c] * inv_std) / p.values * on_dy
        _, mean_lo = _mean_parts(saved, constants, c)
        for at in range(c, p.width, p.channels):
            constants[ON_DY, at] = on_dy
            constants[ON_X, at] = on_xhat * (inv_std / np.float64(constants[PRESCALE, c]))
            constants[CONSTANT, at] = -on_dy * sums[0, 0, c] / p.values - on_xhat * inv_std * mean_lo
            constants[POSTSCALE, at] = postscale


# ---- maps: of n values of one channel, or of n channels one value each; then units ----


@_jit
def _map_plane(p: _Plan, x: Array, residual: Array, y: Array, start: int, n: int, line: Line) -> None:
    for i in range(np.uintp(start), np.uintp(start + n)):
        y[i] = _y(p, x[i], residual[i], line)


@_jit
def _map_row(p: _Plan, x: Array, residual: Array, y: Array, start: int, n: int, c: int, constants: Array) -> None:
    first, channel = np.uintp(start), np.uintp(c)
    for i in range(np.uintp(n)):
        y[first + i] = _y(p, x[first + i], residual[first + i], _line(constants, channel + i))


@_jit
def _map_grad_plane(
    p: _Plan,
    dy: Array,
    x: Array,
    residual: Array,
    dx: Array,
    dresidual: Array,
    start: int,
    n: int,
    line: Line,
    slopes: Line,
) -> None:
    for i in range(np.uintp(start), np.uintp(start + n)):
        dz = _dz(p, dy[i], x[i], residual[i], line)
        dx[i] = _dx(p, dz, x[i], line, slopes)
        if p.keeps:
            dresidual[i] = dz


@_jit
def _map_grad_row(
    p: _Plan,
    dy: Array,
    x: Array,
    residual: Array,
    dx: Array,
    dresidual: Array,
    start: int,
    n: int,
    c: int,
    constants: Array,
) -> None:
    first, channel = np.uintp(start), np.uintp(c)
    for i in range(np.uintp(n)):
        at, line = first + i, _line(constants, channel + i)
        dz = _dz(p, dy[at], x[at], residual[at], line)
        dx[at] = _dx(p, dz, x[at], line, _slopes(constants, channel + i))
        if p.keeps:
            dresidual[at] = dz


@_jit
def _map(p: _Plan, a: _Arrays, dy: Array | None, units: Range, channels: Range) -> None:
    """From the end backwards, which begins with what the sums have just left in the cache."""
    x, residual, out, dresidual, constants = a.x, a.residual, a.out, a.dresidual, a.constants
    for end in range(units[1], units[0], -STRETCH):
        for unit in range(max(units[0], end - STRETCH), end):
            if p.rows:
                start, n = _row(p, x.size, unit, channels)
                if dy is None:
                    _map_row(p, x, residual, out, start, n, channels[0], constants)
                else:
                    _map_grad_row(p, dy, x, residual, out, dresidual, start, n, channels[0], constants)
                continue
            for c in range(channels[0], channels[1]):
                start, n = _plane(p, unit, c)
                line = _line(constants, c)
                if dy is None:
                    _map_plane(p, x, residual, out, start, n, line)
                else:
                    _map_grad_plane(p, dy, x, residual, out, dresidual, start, n, line, _slopes(constants, c))


# ---- threads ----


@_jit
def _share(step: int, t: int, threads: int, p: _Plan, a: _Arrays, dy: Array | None, eps: float) -> None:
    """Thread t's share of a step, or of several."""
    first, last = _tiles(p, t, threads)
    for tile in range(first, last):
        segments, units, channels, finished = _tile(p, tile, threads)
        if step & REDUCE:
            _reduce(p, a, dy, segments, channels)
        if step & FINISH:
            if dy is None:
                _finish_forward(p, a, eps, finished)
            else:
                _finish_backward(p, a, finished)
        if step & MAP:
            _map(p, a, dy, units, channels)


@_parallel
def _shares(step: int, threads: int, p: _Plan, a: _Arrays, dy: Array | None, eps: float) -> None:
    for t in prange(threads):
        _share(step, np.intp(t), threads, p, a, dy, eps)


_one_at_a_time = threading.Lock()


def _layer() -> str | None:
    """Numba's threading layer, which is chosen at the first parallel call."""
    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined]
    except ValueError:
        return None


def _most_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def _in_parallel(step: int, threads: int, *arguments: Any) -> None:
    """Numba's workqueue layer cannot take two callers at once; the others can."""
    with nullcontext() if _layer() in ("tbb", "omp") else _one_at_a_time:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            _shares(step, threads, *arguments)
        finally:
            numba.set_num_threads(before)


# ---- the verbs ----


def _input(array: Array) -> Array:
    """As compiled code takes it: flat, and always read-only, since that is part of the type."""
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


def _run(
    steps: int,
    x: Array,
    residual: Array | None,
    dy: Array | None,
    out: Array,
    dresidual: Array | None,
    origin: Array,
    saved: Array,
    eps: float,
    activation: int,
    frozen: bool,
    threads: int,
) -> Array:
    """Does the steps: all at once where a thread has its channels to itself, else one after the other.

    Returns the totals of the sums, (2, channels).
    """
    threads = max(1, min(threads, x.size // WORK_PER_THREAD, _most_threads()))
    if _config.in_forked_child():
        threads = 1
    flags = int(activation), residual is not None, dresidual is not None, bool(frozen)
    p = _plan(x.shape, x.itemsize, threads, *flags)
    x, out = _input(x), out.reshape(-1)
    a = _Arrays(
        x=x,
        residual=x if residual is None else _input(residual),
        out=out,
        dresidual=out if dresidual is None else dresidual.reshape(-1),
        origin=np.tile(origin, p.width // p.channels),
        sums=np.zeros((p.segments, 2, p.width)),
        saved=saved,
        constants=np.empty((9, p.width), x.dtype),
    )
    arguments = p, a, None if dy is None else _input(dy), float(eps)
    if dy is not None or not steps & FINISH:
        _set_line(saved, a.constants, (0, p.channels))
    for step in (steps,) if p.by_channels else (step for step in (REDUCE, FINISH, MAP) if step & steps):
        if threads > 1:
            _in_parallel(step, threads, *arguments)
        else:
            _share(step, 0, 1, *arguments)
    return a.sums[0, :, : p.channels]


def _origin(x: Array) -> Array:
    """The origin of each channel's sums: the median of three of its values, so that one outlier does not matter."""
    outer, _, inner = x.shape
    a, b, d = x[0, :, 0], x[outer // 2, :, inner // 2], x[-1, :, -1]
    median = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), d)).astype(np.float64)
    return np.where(np.isfinite(median), median, 0)


def _save_parameters(saved: Array, gamma: Array | None, beta: Array | None) -> None:
    saved[GAMMA] = 1 if gamma is None else gamma
    saved[BETA] = 0 if beta is None else beta


@np.errstate(all="ignore")
def forward(
    x: Array,
    residual: Array | None,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    correction: int,
    eps: float,
    activation: int,
    y: Array,
    saved: Array,
    threads: int,
) -> None:
    """fbn_forward of src_c/fastbn.h."""
    if not x.size:
        return
    _save_parameters(saved, gamma, beta)
    _run(REDUCE | FINISH | MAP, x, residual, None, y, None, _origin(x), saved, eps, activation, False, threads)
    if running_mean is not None and running_var is not None:
        values = x.shape[0] * x.shape[2]
        unbiased = saved[VAR] * (values / (values - correction))
        running_mean[...] = (1 - momentum) * running_mean + momentum * saved[MEAN]
        running_var[...] = (1 - momentum) * running_var + momentum * unbiased


@np.errstate(all="ignore")
def infer(
    x: Array,
    residual: Array | None,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    eps: float,
    activation: int,
    y: Array,
    saved: Array | None,
    threads: int,
) -> None:
    """fbn_infer of src_c/fastbn.h."""
    known = np.empty((len(SAVED_ROWS), x.shape[1])) if saved is None else saved
    known[MEAN], known[MEAN_LOW], known[VAR] = mean, 0, var
    std = np.sqrt(known[VAR] + eps)
    known[INV_STD] = np.where(std == 0, 0, 1 / std)
    _save_parameters(known, gamma, beta)
    if x.size:
        _run(MAP, x, residual, None, y, None, known[MEAN], known, eps, activation, True, threads)


@np.errstate(all="ignore")
def backward(
    dy: Array,
    x: Array,
    residual: Array | None,
    saved: Array,
    frozen: bool,
    activation: int,
    dx: Array,
    dresidual: Array | None,
    dgamma: Array | None,
    dbeta: Array | None,
    threads: int,
) -> None:
    """fbn_backward of src_c/fastbn.h."""
    reduces = not frozen or dgamma is not None or dbeta is not None
    steps = REDUCE | FINISH | MAP if reduces else FINISH | MAP
    totals = np.zeros((2, x.shape[1]))
    if x.size:
        totals = _run(steps, x, residual, dy, dx, dresidual, saved[MEAN], saved, 0, activation, frozen, threads)
    if dgamma is not None:
        dgamma[...] = totals[1] * saved[INV_STD]
    if dbeta is not None:
        dbeta[...] = totals[0]


def describe() -> dict[str, str]:
    """For show_config()."""
    return {
        "version": numba.__version__,
        "threading layer": _layer() or "not started",
        "most threads": str(_most_threads()),
    }
