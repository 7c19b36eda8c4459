"""How does Numba compute batch norm? In plain loops (numba_loops.py), compiled on first use and kept on disk.

A call reduces (adds up each channel), finishes (makes a channel's constants of its sums) and maps (makes y or dx of
the constants). The data is walked in strips, parts of the channels, and in the rows of a strip, which are runs of
memory. There are three ways through memory: channels-last data and tiny planes have rows of all channels, small planes
rows of a block of channels, and large planes rows of one channel. Sums are float64, about a value near the mean, so
that a common offset cancels before anything is squared.

Where strips fit in the cache, one thread does all steps on a strip. Otherwise all threads do one step after the other,
and map from the end backwards, which the cache still holds. A strip is summed by segments of its rows. Both follow
from the shape alone, and segments are added in order, so no bit depends on the number of threads. These are Python's,
and run the same compiled code without the GIL.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np

from .._moments import blend
from ..call.record import BackwardCall, Call
from ..config import thread_count
from . import SAVED_ROWS
from . import numba_loops as loops
from .numba_loops import BETA, GAMMA, IDENTITY, INV_STD, MEAN, MEAN_LOW, STRIP, VAR, compiled, row_of

DTYPES = frozenset({"float32", "float64"})

Array = np.ndarray[Any, Any]
Range = tuple[int, int]
SEGMENT_ROWS, SEGMENTS_MOST = 64, 64  # rows that a segment has at least, and segments that a strip has at most
STRIP_BYTES = 1 << 22  # of a strip that one thread takes by itself
WORK_PER_THREAD = 32768  # values that are worth waking a thread for
_MOST_THREADS = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]

PREPARE, REDUCE, FINISH, MAP = 1, 2, 4, 8

_jit = compiled()
_inline = compiled(forceinline=True)
_kept = compiled(cache=True)


class _Split(NamedTuple):
    """How a call is cut, which follows from its shape alone."""

    size: int
    channels: int
    inner: int
    plane: bool  # whether a strip is one channel
    width: int  # of what a strip has of the whole rows, or of a plane
    columns: int  # of a row, but where fewer are left
    pieces: int  # rows in a plane
    stride: int  # from one plane, or row, to the next in its strip
    rows: int
    block: int  # channels in a strip
    strips: int
    segment: int  # rows in a segment
    segments: int


class _Task(NamedTuple):
    """What a call computes, and how."""

    steps: int
    threads: int
    by_strips: bool  # one thread does all steps on a strip
    backward: bool
    plain: bool  # no activation, mask or residual that matters, and x is x
    in_place: bool
    activation: int
    slope: float
    eps: float
    count: float  # type: ignore[assignment]  # of the values in each channel's statistics
    adds: bool  # a residual
    keeps: bool  # its gradient
    masked: bool
    frozen: bool
    from_y: bool


class _Arrays(NamedTuple):
    """The arrays of one call, those of data flat. Where one is absent, another stands there unused."""

    x: Array
    residual: Array
    dy: Array
    mask: Array
    out: Array  # y or dx
    dresidual: Array
    origin: Array  # of the sums of each channel; the mean in a backward call
    parts: Array  # (segments, 2, channels): the sums
    totals: Array  # (2, channels): sum and m2, or dbeta and dgamma
    saved: Array  # (6, channels)
    constants: Array  # (loops.CONSTANTS, channels), in the data's dtype


def _up(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=256)
def _split(shape: tuple[int, int, int]) -> _Split:
    outer, channels, inner = shape
    row, pieces, repeats, plane = max(1, channels * inner), 1, 1, inner > STRIP // 2
    block = 1 if plane else min(channels, STRIP // max(1, inner))
    columns = block * inner
    if plane:  # equal pieces, if they are not short
        columns = next((n for n in range(min(inner, STRIP), STRIP // 2, -1) if inner % n == 0), STRIP)
        pieces = _up(inner, columns)
    elif block == channels:
        repeats = max(1, min(outer, STRIP // row))
        columns = repeats * row
    rows = _up(outer, repeats) * pieces
    segment = max(SEGMENT_ROWS, _up(rows, SEGMENTS_MOST))
    return _Split(
        *(outer * channels * inner, channels, inner, plane, repeats * block * inner, columns, pieces, repeats * row),
        *(rows, block, _up(channels, max(1, block)), segment, _up(rows, segment)),
    )


# The rows of a strip -------------------------------------------------------------------------------------------------


@_inline
def _run(p: _Split, c0: int, c1: int, row: int) -> Range:
    """Where a row begins and ends."""
    at = row % p.pieces * p.columns
    start = row // p.pieces * p.stride + c0 * p.inner + at
    width = p.width if c1 - c0 == p.block else (c1 - c0) * p.inner
    return start, min(start + min(p.columns, width - at), p.size)


@_jit
def _spread(p: _Split, values: Array, c0: int, c1: int, row: Array) -> None:
    """Gives each column its channel's value."""
    k, columns = 0, 1 if p.plane else p.columns
    while k < columns:
        if p.inner == 1:
            n = min(c1 - c0, columns - k)
            for i in range(n):
                row[k + i] = values[c0 + i]
            k += n
        else:
            for c in range(c0, c1):
                row[k : min(k + p.inner, columns)] = values[c]
                k += p.inner


@loops.sum_loop
def _fold(p: _Split, row: Array, c0: int, c1: int, totals: Array) -> None:
    """Adds up what the columns of each channel have."""
    totals[c0:c1] = 0.0
    k, columns = 0, 1 if p.plane else p.columns
    while k < columns:
        for c in range(c0, c1):
            total = 0.0
            for i in range(k, min(k + p.inner, columns)):
                total += row[i]
            totals[c] += total
            k += p.inner


@_jit
def _keep(p: _Split, mask: Array, c0: int, c1: int, start: int, kept: Array) -> None:
    """What the mask says of each value of a run: any byte but 0 is True."""
    k = 0
    while k < kept.size:
        at = (start + k) % p.inner
        first = (start + k) // (p.channels * p.inner) * p.inner + at
        if p.inner == 1:
            end = min(kept.size, k + c1 - c0)
            kept[k:end] = mask[first] != 0
        else:
            end = min(kept.size, k + p.inner - at)
            for i in range(end - k):
                kept[k + i] = mask[first + i] != 0
        k = end


@_jit
def _prepare_row(p: _Split, q: _Task, a: _Arrays, c0: int, c1: int, run: Range, line: Array, kept: Array) -> None:
    """Fills the rows of `line` from which both the sums and dx come: dz, and x or what stands for it."""
    start, end = run
    n, slope, x = end - start, line.dtype.type(q.slope), a.x[start:end]
    seen, z, dz = row_of(line, loops.X, n), row_of(line, loops.Z, n), row_of(line, loops.DZ, n)
    if q.masked:
        _keep(p, a.mask, c0, c1, start, kept[:n])
    loops.copy(x, seen)
    if not q.backward:
        return
    if q.from_y:  # y tells on which side of a kink z was, and gamma * xhat + beta stands for x
        loops.copy(x, z)
        loops.deactivate(q.activation, x, seen, slope)
        for k in range(n if q.adds else 0):
            seen[k] -= a.residual[start + k]
    elif q.activation != IDENTITY and q.adds:
        loops.normalize_and_add(p.plane, x, a.residual[start:end], z, line)
    elif q.activation != IDENTITY:
        loops.normalize(p.plane, x, z, line)
    loops.activate_gradient(q.activation, a.dy[start:end], z, dz, slope)
    if q.masked:
        loops.judge(kept[:n], a.dy[start:end], dz)


@_jit
def _reduce(
    p: _Split, q: _Task, a: _Arrays, c0: int, c1: int, segment: int, line: Array, kept: Array, sums: Array
) -> None:
    """The sums of a segment."""
    x, dy, row, last = a.x, a.dy, segment * p.segment, min(p.rows, (segment + 1) * p.segment)
    for k in range(1 if p.plane else p.columns):
        sums[loops.SUM * STRIP + k] = sums[loops.PRODUCT * STRIP + k] = 0.0
    as_it_is = not q.masked and (q.plain or not q.backward)
    while row < last:
        i, end = _run(p, c0, c1, row)
        n, j, k, m = end - i, i + p.stride, i + 2 * p.stride, i + 3 * p.stride
        if as_it_is and p.plane:
            loops.add(q.backward, True, dy[i:end], x[i:end], kept, sums)
        elif as_it_is and row + 4 <= last and m + n <= p.size:
            dys = dy[i:end], dy[j : j + n], dy[k : k + n], dy[m : m + n]
            xs = x[i:end], x[j : j + n], x[k : k + n], x[m : m + n]
            loops.add_four(q.backward, dys, xs, sums)
            row += 3
        else:
            _prepare_row(p, q, a, c0, c1, (i, end), line, kept)
            loops.add(q.backward, p.plane, row_of(line, loops.DZ, n), row_of(line, loops.X, n), kept, sums)
        row += 1
    _fold(p, sums[loops.SUM * STRIP :], c0, c1, a.parts[segment, 0])
    _fold(p, sums[loops.PRODUCT * STRIP :], c0, c1, a.parts[segment, 1])


@_inline
def _map(p: _Split, q: _Task, a: _Arrays, c0: int, c1: int, segment: int, line: Array, kept: Array) -> None:
    """Fills y, or dx and dresidual, in the rows of a segment."""
    x, dy, out, plain = a.x, a.dy, a.out, q.plain and not q.in_place
    for row in range(segment * p.segment, min(p.rows, (segment + 1) * p.segment)):
        i, end = _run(p, c0, c1, row)
        z, dz = row_of(line, loops.Z, end - i), row_of(line, loops.DZ, end - i)
        if plain and not q.backward:
            loops.normalize(p.plane, x[i:end], out[i:end], line)
        elif plain and q.frozen:
            loops.differentiate_frozen(p.plane, dy[i:end], out[i:end], line)
        elif plain:
            loops.differentiate(p.plane, dy[i:end], x[i:end], out[i:end], line)
        elif q.backward:
            _prepare_row(p, q, a, c0, c1, (i, end), line, kept)
            if q.frozen:
                loops.differentiate_frozen(p.plane, dz, out[i:end], line)
            else:
                loops.differentiate(p.plane, dz, row_of(line, loops.X, end - i), out[i:end], line)
            if q.masked:
                loops.leave_out(p.plane, kept, dz, out[i:end], line)
            if q.keeps:
                loops.copy(dz, a.dresidual[i:end])
        else:
            if q.adds:
                loops.normalize_and_add(p.plane, x[i:end], a.residual[i:end], z, line)
            else:
                loops.normalize(p.plane, x[i:end], z, line)
            loops.activate(q.activation, z, out[i:end], line.dtype.type(q.slope))


@_jit
def _set_constants(steps: int, q: _Task, a: _Arrays, c0: int, c1: int) -> None:
    """What the loops need of the channels. A backward call has its line before the sums, others have it after them."""
    for segment in range(a.parts.shape[0] if steps & FINISH else 0):
        for k in range(2):
            for c in range(c0, c1):
                a.totals[k, c] = a.parts[segment, k, c] + (a.totals[k, c] if segment else 0.0)
    for c in range(c0, c1):
        if steps & FINISH and not q.backward:
            if q.steps & REDUCE:
                loops.set_moments(a.origin, a.totals, q.count, a.saved, c)
            var = a.saved[VAR, c] + q.eps
            a.saved[INV_STD, c] = 0.0 if var == 0 else 1 / math.sqrt(var)
        if steps & (PREPARE if q.backward else FINISH):
            loops.set_line(a.saved, a.constants, c)
        if steps & FINISH and q.backward:
            if q.steps & REDUCE:
                a.totals[1, c] = (a.totals[1, c] - a.totals[0, c] * a.saved[MEAN_LOW, c]) * a.saved[INV_STD, c]
            loops.set_gradient(a.saved, a.totals, q.count, a.constants, c)


# Threads -------------------------------------------------------------------------------------------------------------


@_kept
def _share(steps: int, t: int, p: _Split, q: _Task, a: _Arrays) -> None:
    """Thread t's share of the steps: some strips; or, of one step, some segments of all strips, or some channels."""
    n = p.strips if q.by_strips else p.channels if steps & (PREPARE | FINISH) else p.strips * p.segments
    unit, last = n * t // q.threads, n * (t + 1) // q.threads
    if not q.by_strips and steps & (PREPARE | FINISH):
        _set_constants(steps, q, a, unit, last)
        return
    if q.by_strips:
        unit, last = unit * p.segments, last * p.segments
    line, sums = np.zeros(loops.LINE_ROWS * STRIP, a.constants.dtype), np.empty(loops.SUM_ROWS * STRIP)
    kept = np.ones(STRIP, np.uint8)
    while unit < last:
        strip = unit // p.segments
        first, end = unit - strip * p.segments, min(last - strip * p.segments, p.segments)
        c0, c1 = strip * p.block, min((strip + 1) * p.block, p.channels)
        if steps & PREPARE:
            _set_constants(PREPARE, q, a, c0, c1)
        if steps & REDUCE:
            _spread(p, a.origin, c0, c1, sums[loops.ORIGIN * STRIP :])
            for k in range(loops.FORWARD_CONSTANTS if q.backward and not q.plain else 0):
                _spread(p, a.constants[k], c0, c1, line[k * STRIP :])
            for segment in range(first, end):
                _reduce(p, q, a, c0, c1, segment, line, kept, sums)
        if steps & FINISH:
            _set_constants(FINISH, q, a, c0, c1)
        if steps & MAP:
            for k in range(loops.CONSTANTS if q.backward else loops.FORWARD_CONSTANTS):
                _spread(p, a.constants[k], c0, c1, line[k * STRIP :])
            for segment in range(end - 1, first - 1, -1):
                _map(p, q, a, c0, c1, segment, line, kept)
        unit += end - first


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="fastbn")


def _in_parallel(steps: int, p: _Split, q: _Task, a: _Arrays) -> None:
    """Every thread's share, on threads of Python's, which run compiled code without the GIL.

    Numba's own prange would compile `_share` once more, and LLVM may then fuse and order its operations otherwise: the
    bits would depend on the number of threads.
    """
    others = [_pool().submit(_share, steps, t, p, q, a) for t in range(1, q.threads)]
    _share(steps, 0, p, q, a)
    for other in others:
        other.result()


# The verbs -----------------------------------------------------------------------------------------------------------


def _input(array: Array) -> Array:
    """As compiled code takes it: flat, and always read-only, since that is part of the type."""
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


@np.errstate(all="ignore")
def _calculate(
    steps: int, x: Array, saved: Array, threads: int, *, origin: Array | None = None, residual: Array | None = None,
    dy: Array | None = None, mask: Array | None = None, out: Array | None = None, dresidual: Array | None = None,
    sums: Array | None = None, count: float = 1, eps: float = 0, activation: int = IDENTITY, slope: float = 0,
    frozen: bool = False, from_y: bool = False,
) -> Array:  # fmt: skip
    """Does the steps: all at once where a thread has its strips to itself, else one after the other.

    Gives `sums`, (2, channels), or those that it takes itself.
    """
    if not x.size:
        steps &= FINISH
    threads = 1 if thread_count.in_forked_child() else max(1, min(threads, x.size // WORK_PER_THREAD, _MOST_THREADS))
    p, channels, changed = _split(x.shape), x.shape[1], x if dy is None else dy
    balanced = 5 * _up(p.strips, threads) * threads <= 7 * p.strips
    q = _Task(
        steps=steps, threads=threads, by_strips=x.size > 0 and balanced and x.nbytes <= STRIP_BYTES * p.strips,
        backward=dy is not None,
        plain=activation == IDENTITY and not from_y and mask is None and dresidual is None
        and (residual is None or dy is not None),
        in_place=out is not None and out.ctypes.data == changed.ctypes.data,
        activation=int(activation), slope=float(slope), eps=float(eps), count=float(count), adds=residual is not None,
        keeps=dresidual is not None, masked=mask is not None, frozen=bool(frozen), from_y=bool(from_y),
    )  # fmt: skip
    flat, target = _input(x), np.empty(0, x.dtype) if out is None else out.reshape(-1)
    a = _Arrays(
        x=flat,
        residual=flat if residual is None else _input(residual),
        dy=flat if dy is None else _input(dy),
        mask=_input(np.empty(0, np.uint8) if mask is None else mask.view(np.uint8)),
        out=target,
        dresidual=target if dresidual is None else dresidual.reshape(-1),
        origin=saved[MEAN] if origin is None else origin,
        parts=np.empty((p.segments if steps & REDUCE else 0, 2, channels)),
        totals=np.zeros((2, channels)) if sums is None else sums,
        saved=saved,
        constants=np.empty((loops.CONSTANTS, channels), x.dtype),
    )
    for some in (steps,) if q.by_strips else (step for step in (PREPARE, REDUCE, FINISH, MAP) if step & steps):
        if threads > 1:
            _in_parallel(some, p, q, a)
        else:
            _share(some, 0, p, q, a)
    return a.totals


def _origin(x: Array, mask: Array | None) -> Array:
    """The origin of each channel's sums: the median of three of its values, so that one outlier does not matter."""
    outer, _, inner = x.shape
    if mask is None:
        three = [0, (outer // 2) * inner + inner // 2, outer * inner - 1]
    else:
        true = np.flatnonzero(mask)
        three = [int(true[k]) for k in (0, true.size // 2, -1)]
    a, b, d = (x[position // inner, :, position % inner] for position in three)
    with np.errstate(all="ignore"):
        median = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), d)).astype(np.float64)
    return np.where(np.isfinite(median), median, 0)


def _count(x: Array, mask: Array | None) -> int:
    return x.shape[0] * x.shape[2] if mask is None else int(np.count_nonzero(mask))


def forward(call: Call) -> None:
    """Ioffe & Szegedy 2015, algorithm 1."""
    if not call.x.size:
        return
    mask = None if call.mask is None else call.mask.view(np.uint8)
    count = _count(call.x, mask)
    _, m2 = _fill_y(REDUCE | FINISH | MAP, call, call.saved, origin=_origin(call.x, mask), mask=mask, count=count)
    blend(call, np.stack((call.saved[MEAN], call.saved[MEAN_LOW], m2)), count)


def _fill_y(steps: int, call: Call, saved: Array, **more: Any) -> Array:
    """Fills y."""
    saved[GAMMA], saved[BETA] = 1 if call.gamma is None else call.gamma, 0 if call.beta is None else call.beta
    return _calculate(
        steps, call.x, saved, call.threads, residual=call.residual, out=call.y, eps=call.eps, activation=call.code,
        slope=call.slope, **more,
    )  # fmt: skip


def infer(call: Call) -> None:
    """Ioffe & Szegedy 2015, algorithm 2."""
    saved = np.empty((len(SAVED_ROWS), call.x.shape[1])) if call.saved is None else call.saved
    saved[MEAN], saved[MEAN_LOW], saved[VAR] = call.running_mean, 0, call.running_var
    _fill_y(FINISH | MAP, call, saved)


def apply(call: Call) -> None:
    """The same, with the statistics that are in saved."""
    _fill_y(FINISH | MAP, call, call.saved)


def moments(call: Call) -> None:
    """Of the values where mask is True; the mean in two pieces."""
    x, mask = call.x, None if call.mask is None else call.mask.view(np.uint8)
    saved, origin, count = np.zeros((len(SAVED_ROWS), x.shape[1])), _origin(x, mask), _count(x, mask)
    _, m2 = _calculate(REDUCE | FINISH, x, saved, call.threads, origin=origin, mask=mask, count=count)
    call.moments[...] = saved[MEAN], saved[MEAN_LOW], m2


@np.errstate(all="ignore")
def _known(saved: Array, from_y: bool) -> Array:
    """What a backward call knows of its channels.

    With from_y, gamma * xhat + beta stands for x: its mean is beta, its standard deviation gamma, and so the gamma with
    which the slope is still that of x is gamma**2 / std. Rota Bulo et al. 2018, section 3.2.
    """
    known = saved.copy()
    if from_y:
        known[MEAN], known[MEAN_LOW] = saved[BETA], 0
        known[INV_STD], known[GAMMA] = 1 / saved[GAMMA], saved[GAMMA] * (saved[GAMMA] * saved[INV_STD])
    return known


def backward_sums(call: BackwardCall) -> None:
    """Of dz, dbeta, and of dz * xhat, dgamma: Ioffe & Szegedy 2015, section 3."""
    call.sums[...] = 0
    _differentiate(REDUCE, call, sums=call.sums)


def _differentiate(steps: int, call: BackwardCall, sums: Array, **more: Any) -> None:
    """The steps that every gradient needs, and these."""
    _calculate(
        PREPARE | FINISH | steps, call.x, _known(call.saved, call.from_y), call.threads, residual=call.residual,
        dy=call.dy, mask=call.mask, sums=sums, activation=call.code, slope=call.slope, from_y=call.from_y, **more,
    )  # fmt: skip


def backward(call: BackwardCall) -> None:
    """Ioffe & Szegedy 2015, section 3, the gradients gathered by input."""
    reduces = call.sums is None and not (call.frozen and call.dgamma is None and call.dbeta is None)
    totals = np.zeros((2, call.x.shape[1])) if call.sums is None else np.array(call.sums)
    _differentiate(
        MAP | (REDUCE if reduces else 0), call, totals, out=call.dx, dresidual=call.dresidual, count=call.counted,
        frozen=call.frozen,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        for gradient, total in ((call.dbeta, totals[0]), (call.dgamma, totals[1])):
            if gradient is not None:
                gradient[...] = total


def describe() -> dict[str, str]:
    """For show_config()."""
    return {
        "version": numba.__version__,
        "threads": "Python's, which run compiled code without the GIL",
        "most threads": str(_MOST_THREADS),
    }
