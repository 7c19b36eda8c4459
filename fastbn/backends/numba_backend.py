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
    streams: bool  # results are written around the cache


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
def _share(p: _Plan, parts: int, group: Range, t: int, threads: int) -> Iterator[tuple[int, int, int]]:
    """Thread t's parts (segments or units), each with the channels that are t's there; from the last one backwards."""
    channels = group[1] - group[0]
    first, last = parts * channels * t // threads, parts * channels * (t + 1) // threads
    for part in range((last - 1) // channels, first // channels - 1, -1):
        c0, c1 = max(0, first - part * channels), min(channels, last - part * channels)
        if c0 < c1:
            yield part, group[0] + c0, group[0] + c1


@_jit
def _runs(p: _Plan, size: int, group: Range, t: int, threads: int) -> Iterator[tuple[int, int, int, int]]:
    """What thread t adds up: for segment s, n values from `start` on, of channel c or of channels from c on."""
    for s, c0, c1 in _share(p, p.segments, group, t, threads):
        for unit in range(s * p.segment, min((s + 1) * p.segment, p.units)):
            for c in range(c0, c1):
                start, n = _place(p, size, unit, c)
                yield s, start, n, c


@_jit
def _chunks(p: _Plan, size: int, group: Range, t: int, threads: int) -> Iterator[tuple[int, int, int, int]]:
    """What thread t maps: n values from `start` on, of channel c or of channels from c on, and as many of channels
    after c where `planes` is more than 1."""
    together = 1 if p.rows else max(1, CHUNK // p.cut)
    for unit, c0, c1 in _share(p, p.units, group, t, threads):
        for c in range(c0, c1, together):
            start, length = _place(p, size, unit, c)
            for at in range(0, length, CHUNK):
                yield start + at, min(CHUNK, length - at), c + at if p.rows else c, min(together, c1 - c)


@_jit
def _place(p: _Plan, size: int, unit: int, c: int) -> Range:
    """Where channel c of a unit, or the unit of rows, begins, and how many values it has."""
    if p.rows:
        return unit * p.width, min(p.width, size - unit * p.width)
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
    for s, start, n, c in _runs(p, x.size, group, t, threads):
        if p.rows:
            _sum_row(x, start, n, origin, sums[s])
        else:
            total, squares = _sum_plane(x, start, n, origin[c])
            sums[s, 0, c] += total
            sums[s, 1, c] += squares


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
    for s, start, n, c in _runs(p, x.size, group, t, threads):
        if p.rows:
            _sum_grad_row(p, dy, x, residual, start, n, constants, mean, sums[s])
        else:
            total, products = _sum_grad_plane(p, dy, x, residual, start, n, _line(constants, c), mean[c])
            sums[s, 0, c] += total
            sums[s, 1, c] += products


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
    for start, n, c, planes in _chunks(p, x.size, group, t, threads):
        for k in range(planes):
            if p.rows:
                _map_row(p, x, residual, start, n, constants, c, buffer)
            else:
                _map_plane(p, x, residual, start + k * n, n, _line(constants, c + k), buffer, k * n)
        _put(buffer, planes * n, y, start, p.streams)
    if p.streams:
        _fence()


@_jit
def _map_grad_plane(
    p: _Plan, dy: Array, x: Array, residual: Array, start: int, n: int, line: Line, slopes: Line, to: Array, also: Array, at: int
) -> None:  # fmt: skip
    first, out = np.uintp(start), np.uintp(at)
    for i in range(np.uintp(n)):
        value = x[first + i]
        dz = _dz(p, dy[first + i], value, residual[first + i], line)
        to[out + i] = _dx(p, dz, value, line, slopes)
        if p.keeps:
            also[out + i] = dz


@_jit
def _map_grad_row(
    p: _Plan, dy: Array, x: Array, residual: Array, start: int, n: int, constants: Array, c: int, to: Array, also: Array
) -> None:  # fmt: skip
    first, channel = np.uintp(start), np.uintp(c)
    for i in range(np.uintp(n)):
        value, line = x[first + i], _line(constants, channel + i)
        dz = _dz(p, dy[first + i], value, residual[first + i], line)
        to[i] = _dx(p, dz, value, line, _slopes(constants, channel + i))
        if p.keeps:
            also[i] = dz


@_jit
def _map_backward(
    t: int, threads: int, p: _Plan, group: Range, dy: Array, x: Array, residual: Array, constants: Array, dx: Array, dresidual: Array
) -> None:  # fmt: skip
    buffer, also = np.empty(CHUNK, dx.dtype), np.empty(CHUNK, dx.dtype)
    for start, n, c, planes in _chunks(p, x.size, group, t, threads):
        for k in range(planes):
            if p.rows:
                _map_grad_row(p, dy, x, residual, start, n, constants, c, buffer, also)
            else:
                line, slopes = _line(constants, c + k), _slopes(constants, c + k)
                _map_grad_plane(p, dy, x, residual, start + k * n, n, line, slopes, buffer, also, k * n)
        _put(buffer, planes * n, dx, start, p.streams)
        if p.keeps:
            _put(also, planes * n, dresidual, start, p.streams)
    if p.streams:
        _fence()


# ---- the channels' constants, for some channels ----


def _prescale(mean: Array, inv_std: Array, dtype: Any) -> Array:
    """The powers of two with which x - mean and its products stay inside the exponent range.

    1 for any usual channel; where the spread is below 2^-60 or above 2^60 (of float32), it brings x - mean near 1.
    """
    most, usual = (1020, 500) if dtype == np.float64 else (124, 60)
    e = np.frexp(inv_std)[1] - 1
    e[abs(e) <= usual] = 0
    e = np.where(mean != 0, np.minimum(e, most - 1 - np.frexp(mean)[1]), e).clip(-most, most)
    return np.ldexp(1.0, np.where((inv_std > 0) & np.isfinite(inv_std) & np.isfinite(mean), e, 0))


def _mean_parts(saved: Array, dtype: Any) -> tuple[Array, Array]:
    """The mean in the data's dtype, and what that lacks."""
    mean_hi = saved[MEAN].astype(dtype)
    return mean_hi, (saved[MEAN] - mean_hi) + saved[MEAN_LOW]


def _set_line(saved: Array, constants: Array) -> None:
    """For y = ((x - mean_hi) - mean_lo) * inv_std * gamma + beta, where the term of mean_lo moves into the shift."""
    dtype, channels = constants.dtype, saved.shape[1]
    mean_hi, mean_lo = _mean_parts(saved, dtype)
    prescale = _prescale(saved[MEAN], saved[INV_STD], dtype)
    slope = saved[INV_STD] * saved[GAMMA]
    moved = mean_lo * slope
    shift = (saved[BETA] - moved).astype(dtype)
    by_channel = constants.reshape(len(constants), -1, channels)
    by_channel[PRESCALE] = prescale
    by_channel[NEG_MEAN] = -mean_hi * prescale
    by_channel[SCALE] = slope / prescale
    by_channel[SHIFT] = shift
    by_channel[SHIFT_LOW] = (saved[BETA] - shift) - moved


def _set_slopes(saved: Array, constants: Array, total: Array, products: Array, values: int) -> None:
    """For dx = A dz + B (x - mean) + D: A = gamma/std, B = -A sum(dz (x - mean)) / (M var), D = -A sum(dz) / M.

    That is Ioffe & Szegedy 2015, section 3, gathered by input. _dx has x - mean_hi, prescaled.
    """
    by_channel = constants.reshape(len(constants), -1, saved.shape[1])
    inv_std = saved[INV_STD]
    a = inv_std * saved[GAMMA]
    b = -a * inv_std * inv_std * products / values
    by_channel[ON_DY] = a
    by_channel[ON_X] = b / by_channel[PRESCALE]
    by_channel[CONSTANT] = -a * total / values - b * _mean_parts(saved, constants.dtype)[1]


def _set_moments(saved: Array, origin: Array, total: Array, squares: Array, values: int) -> None:
    """Mean and variance of the batch, from sums about the origin."""
    offset = total / values
    mean = origin + offset
    back = mean - origin
    lost = (origin - (mean - back)) + (offset - back)  # by the sum's rounding (Knuth's two-sum)
    m2 = squares - total * offset
    saved[MEAN], saved[MEAN_LOW] = mean, np.where(np.isnan(lost), 0, lost)
    saved[VAR] = np.where(m2 < 0, 0, m2) / values


def _set_inv_std(saved: Array, eps: float) -> None:
    std = np.sqrt(saved[VAR] + eps)
    saved[INV_STD] = np.divide(1, std, out=np.zeros_like(std), where=std != 0)


# ---- threads ----


@_parallel
def _sum_forward_shares(
    threads: int, p: _Plan, group: Range, x: Array, origin: Array, sums: Array
) -> None:  # fmt: skip
    for t in prange(threads):
        _sum_forward(np.intp(t), threads, p, group, x, origin, sums)


@_parallel
def _sum_backward_shares(
    threads: int, p: _Plan, group: Range, dy: Array, x: Array, residual: Array, mean: Array, constants: Array, sums: Array
) -> None:  # fmt: skip
    for t in prange(threads):
        _sum_backward(np.intp(t), threads, p, group, dy, x, residual, mean, constants, sums)


@_parallel
def _map_forward_shares(
    threads: int, p: _Plan, group: Range, x: Array, residual: Array, constants: Array, y: Array
) -> None:  # fmt: skip
    for t in prange(threads):
        _map_forward(np.intp(t), threads, p, group, x, residual, constants, y)


@_parallel
def _map_backward_shares(
    threads: int, p: _Plan, group: Range, dy: Array, x: Array, residual: Array, constants: Array, dx: Array, dresidual: Array
) -> None:  # fmt: skip
    for t in prange(threads):
        _map_backward(np.intp(t), threads, p, group, dy, x, residual, constants, dx, dresidual)


_SHARES = {
    _sum_forward: _sum_forward_shares,
    _sum_backward: _sum_backward_shares,
    _map_forward: _map_forward_shares,
    _map_backward: _map_backward_shares,
}
_one_at_a_time = threading.Lock()


def _layer() -> str | None:
    """Numba's threading layer, which is chosen at the first parallel call."""
    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined]
    except ValueError:
        return None


def _most_threads() -> int:
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def _run(work: Any, values: int, threads: int, *arguments: Any) -> None:
    """Does the work on as many of the threads as are worth waking for so many values.

    Numba's workqueue layer cannot take two callers at once; the others can.
    """
    threads = min(threads, values // WORK_PER_THREAD, _most_threads())
    if threads < 2 or _config.in_forked_child():
        work(0, 1, *arguments)
        return
    with nullcontext() if _layer() in ("tbb", "omp") else _one_at_a_time:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            _SHARES[work](threads, *arguments)
        finally:
            numba.set_num_threads(before)


# ---- the verbs ----


def _plan(
    x: Array, residual: Array | None, out: Array, dresidual: Array | None, activation: int, frozen: bool
) -> _Plan:
    flags = residual is not None, dresidual is not None, bool(frozen), out.nbytes > STREAM_BYTES
    return _Plan(*_split(*x.shape, x.itemsize), int(activation), *flags)


def _groups(p: _Plan) -> Iterator[tuple[Range, slice]]:
    """For compiled code, to which a unit of rows is one channel, and for NumPy."""
    if p.rows:
        yield (0, 1), slice(0, p.channels)
        return
    for c in range(0, p.channels, p.group):
        last = min(c + p.group, p.channels)
        yield (c, last), slice(c, last)


def _recurring(p: _Plan, channels: Array) -> Array:
    return np.tile(channels, p.width // p.channels)


def _totals(p: _Plan, sums: Array, group: slice) -> Array:
    return sums.reshape(p.segments, 2, -1, p.channels)[..., group].sum(axis=(0, 2))


def _input(array: Array) -> Array:
    """As compiled code takes it: flat, and always read-only, since that is part of the type."""
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


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
    p, values = _plan(x, residual, y, None, activation, False), x.shape[0] * x.shape[2]
    origin, sums, constants = _origin(x), np.zeros((p.segments, 2, p.width)), np.empty((8, p.width), x.dtype)
    x_, y_ = _input(x), y.reshape(-1)
    residual_, origin_ = x_ if residual is None else _input(residual), _recurring(p, origin)
    for group, c in _groups(p):
        _run(_sum_forward, x.size, threads, p, group, x_, origin_, sums)
        _set_moments(saved[:, c], origin[c], *_totals(p, sums, c), values)
        _set_inv_std(saved[:, c], eps)
        _set_line(saved[:, c], constants if p.rows else constants[:, c])
        _run(_map_forward, x.size, threads, p, group, x_, residual_, constants, y_)
    if running_mean is not None and running_var is not None:
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
    _save_parameters(known, gamma, beta)
    _set_inv_std(known, eps)
    if not x.size:
        return
    p = _plan(x, residual, y, None, activation, True)
    constants = np.empty((8, p.width), x.dtype)
    _set_line(known, constants)
    x_ = _input(x)
    residual_ = x_ if residual is None else _input(residual)
    everything = (0, 1 if p.rows else p.channels)
    _run(_map_forward, x.size, threads, p, everything, x_, residual_, constants, y.reshape(-1))


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
    channels, values = x.shape[1], x.shape[0] * x.shape[2]
    totals = np.zeros((2, channels))
    if x.size:
        p = _plan(x, residual, dx, dresidual, activation, frozen)
        sums, constants = np.zeros((p.segments, 2, p.width)), np.empty((8, p.width), x.dtype)
        _set_line(saved, constants)
        dy_, x_, dx_ = _input(dy), _input(x), dx.reshape(-1)
        residual_ = x_ if residual is None else _input(residual)
        dresidual_ = dx_ if dresidual is None else dresidual.reshape(-1)
        mean = _recurring(p, saved[MEAN])
        for group, c in _groups(p):
            if not frozen or dgamma is not None or dbeta is not None:
                _run(_sum_backward, x.size, threads, p, group, dy_, x_, residual_, mean, constants, sums)
                totals[:, c] = _totals(p, sums, c)
                totals[1, c] -= totals[0, c] * saved[MEAN_LOW, c]
            _set_slopes(saved[:, c], constants if p.rows else constants[:, c], *totals[:, c], values)
            _run(_map_backward, x.size, threads, p, group, dy_, x_, residual_, constants, dx_, dresidual_)
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
