"""How does Numba compute batch norm? In plain loops (numba_loops.py), compiled on first use and kept on disk.

A call reduces (adds up each channel), finishes (makes a channel's constants of its sums) and maps (makes y or dx of
the constants). The data is walked in strips, parts of the channels, and in the rows of a strip, which are runs of
memory: a piece of one channel's plane where planes are large, else columns of as many channels as fit in, and of
several samples where all do. Each column has its channel's constants, and sums of its own, which are then put together.
Sums are float64, about a value near the mean, so that a common offset cancels before anything is squared.

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
from .numba_loops import BETA, DZ, GAMMA, IDENTITY, INV_STD, MEAN, MEAN_LOW, STRIP, VAR, X, compiled, row_of

DTYPES = frozenset({"float32", "float64"})

Array = np.ndarray[Any, Any]
SEGMENT_ROWS, SEGMENTS_MOST = 64, 64  # rows that a segment has at least, and segments that a strip has at most
STRIP_BYTES = 1 << 22  # of a strip that one thread takes by itself
WORK_PER_THREAD = 32768  # values that are worth waking a thread for
_MOST_THREADS = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]

PREPARE, REDUCE, FINISH, MAP = 1, 2, 4, 8

_jit = compiled()
_part = compiled(inline="always")  # of the one function that calls it
_kept = compiled(cache=True)


class _Split(NamedTuple):
    """How data is cut, which follows from its shape alone."""

    size: int
    channels: int
    inner: int
    block: int  # channels in a strip
    strips: int
    plane: bool  # a row is a piece of one channel's plane
    pieces: int  # in a plane
    length: int  # of a row, but where less is left
    width: int  # of what the pieces are cut from
    stride: int  # from there to the next in the strip
    rows: int  # in a strip
    segment: int  # rows in a segment
    segments: int
    columns: int  # with constants and sums of their own: those of a row, one of a plane
    span: int  # columns of one channel that lie together


class _Task(NamedTuple):
    """What a call computes, and its arrays, those of data flat. An array that is absent has no elements."""

    x: Array
    residual: Array
    dy: Array
    mask: Array
    out: Array  # y or dx
    dresidual: Array
    origin: Array  # of the sums of each channel; the mean in a backward call
    parts: Array  # (segments, 2, channels): the sums; no segments where none are taken
    totals: Array  # (2, channels): sum and m2, or dbeta and dgamma
    saved: Array  # (6, channels)
    constants: Array  # (loops.CONSTANTS, channels), in the data's dtype
    count: float  # type: ignore[assignment]  # of the values in each channel's statistics
    eps: float
    activation: int
    slope: float
    backward: bool
    frozen: bool
    from_y: bool
    as_it_is: bool  # the sums and dx come of dy and x as they are
    in_place: bool


def _up(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=256)
def _split(shape: tuple[int, int, int]) -> _Split:
    outer, channels, inner = shape
    plane, pieces, repeats = inner > STRIP // 2, 1, 1
    if plane:
        block, width = 1, inner  # into equal pieces, if they are not short
        length = next((n for n in range(min(inner, STRIP), STRIP // 2, -1) if inner % n == 0), STRIP)
        pieces = _up(inner, length)
    else:
        block = max(1, min(channels, STRIP // max(1, inner)))
        if block == channels:
            repeats = max(1, min(outer, STRIP // max(1, channels * inner)))
        length = width = repeats * block * inner
    rows = _up(outer, repeats) * pieces
    segment = max(SEGMENT_ROWS, _up(rows, SEGMENTS_MOST))
    return _Split(
        size=outer * channels * inner, channels=channels, inner=inner, block=block, strips=_up(channels, block),
        plane=plane, pieces=pieces, length=length, width=width, stride=repeats * channels * inner, rows=rows,
        segment=segment, segments=max(1, _up(rows, segment)), columns=1 if plane else length,
        span=1 if plane else inner,
    )  # fmt: skip


# The rows of a strip -------------------------------------------------------------------------------------------------


@compiled(forceinline=True)
def _run(p: _Split, c0: int, c1: int, row: int) -> tuple[int, int]:
    """Where a row begins and ends."""
    at = row % p.pieces * p.length
    start = row // p.pieces * p.stride + c0 * p.inner + at
    width = p.width - (p.block - (c1 - c0)) * p.inner
    return start, min(start + min(p.length, width - at), p.size)


@_jit
def _spread(p: _Split, values: Array, c0: int, c1: int, row: Array) -> None:
    """Gives each column its channel's value."""
    given = values[c0:c1]
    for start in range(0, p.columns, p.block * p.span):
        here = row[start:]
        if p.span == 1:
            loops.copy(given, here)
        else:
            for i in range(given.size):
                here[i * p.span : (i + 1) * p.span] = given[i]


@_jit
def _fold(p: _Split, row: Array, c0: int, c1: int, totals: Array) -> None:
    """Adds up what the columns of each channel have."""
    of_block = totals[c0:c1]
    of_block[:] = 0.0
    for start in range(0, p.columns, p.block * p.span):
        here = row[start:]
        for i in range(of_block.size):
            of_block[i] += here[i] if p.span == 1 else loops.total(here[i * p.span : (i + 1) * p.span])


@_jit
def _keep(p: _Split, mask: Array, c0: int, c1: int, start: int, kept: Array) -> None:
    """What the mask says of each value of a run: any byte but 0 is True."""
    k = 0
    while k < kept.size:
        at = (start + k) % p.inner
        first = (start + k) // (p.channels * p.inner) * p.inner + at
        end = min(kept.size, k + (c1 - c0 if p.inner == 1 else p.inner - at))
        for i in range(end - k):
            kept[k + i] = mask[first if p.inner == 1 else first + i] != 0
        k = end


@_part
def _prepare(p: _Split, q: _Task, i: int, end: int, line: Array, kept: Array) -> None:
    """Fills the rows of `line` from which the sums and dx of a run come: dz, and what stands for x where x does not."""
    n, slope = end - i, line.dtype.type(q.slope)
    if q.from_y:
        loops.deactivate(q.activation, q.x[i:end], q.residual[i:end], row_of(line, DZ, n), row_of(line, X, n), slope)
    elif q.activation != IDENTITY and q.residual.size:
        loops.normalize_and_add(p.plane, q.x[i:end], q.residual[i:end], row_of(line, DZ, n), line)
    elif q.activation != IDENTITY:
        loops.normalize(p.plane, q.x[i:end], row_of(line, DZ, n), line)
    loops.activate_gradient(q.activation, q.dy[i:end], row_of(line, DZ, n), slope)
    if q.mask.size:
        loops.judge(q.frozen, kept[:n], q.dy[i:end], row_of(line, DZ, n))


@_part
def _walk(
    p: _Split, q: _Task, adding: bool, c0: int, c1: int, segment: int, line: Array, kept: Array, sums: Array
) -> None:
    """Adds the rows of a segment to the sums, or fills what comes of them."""
    row, last = segment * p.segment, min(p.rows, (segment + 1) * p.segment)
    in_place = q.in_place and not adding  # LLVM's loops are faster from one array to another
    prepared, moved = q.backward and (in_place or not q.as_it_is), not q.backward and in_place
    xs, dzs = line if q.from_y or moved else q.x, line if prepared else q.dy if q.backward else q.x
    four = adding and q.as_it_is and not p.plane
    while row < last:
        i, end = _run(p, c0, c1, row)
        if four and row + 4 <= last and end + 3 * p.stride <= p.size:
            loops.add_four(q.backward, dzs, xs, i, end, p.stride, sums)
            row += 4
            continue
        if q.mask.size:
            _keep(p, q.mask, c0, c1, i, kept[: end - i])
        if prepared:
            _prepare(p, q, i, end, line, kept)
        if moved:
            loops.copy(q.x[i:end], row_of(line, X, end - i))
        k, j = X * STRIP if q.from_y or moved else i, DZ * STRIP if prepared else i
        k_end, j_end = k + end - i, j + end - i
        if adding and p.plane:
            loops.add_plane(q.backward, dzs[j:j_end], xs[k:k_end], kept, sums)
        elif adding:
            loops.add(q.backward, dzs[j:j_end], xs[k:k_end], kept, sums)
        elif q.backward:
            if not q.frozen:
                loops.differentiate(p.plane, dzs[j:j_end], xs[k:k_end], q.out[i:end], line)
            if q.frozen or q.mask.size:
                loops.leave_out(p.plane, kept, dzs[j:j_end], q.out[i:end], line)
            if q.dresidual.size:
                loops.copy(dzs[j:j_end], q.dresidual[i:end])
        else:
            if q.residual.size:
                loops.normalize_and_add(p.plane, xs[k:k_end], q.residual[i:end], q.out[i:end], line)
            else:
                loops.normalize(p.plane, xs[k:k_end], q.out[i:end], line)
            if q.activation != IDENTITY:
                loops.activate(q.activation, q.out[i:end], line.dtype.type(q.slope))
        row += 1


@_part
def _finish(q: _Task, c0: int, c1: int) -> None:
    """Makes the constants of y, or of dx, of the channels' sums."""
    reduced = q.parts.shape[0] > 0
    for segment in range(q.parts.shape[0]):
        for k in range(2):
            for c in range(c0, c1):
                q.totals[k, c] += q.parts[segment, k, c]
    for c in range(c0, c1):
        if q.backward:
            if reduced:
                q.totals[1, c] = (q.totals[1, c] - q.totals[0, c] * q.saved[MEAN_LOW, c]) * q.saved[INV_STD, c]
            loops.set_gradient(q.saved, q.totals, q.count, q.constants, c)
        else:
            if reduced:
                loops.set_moments(q.origin, q.totals, q.count, q.saved, c)
            var = q.saved[VAR, c] + q.eps
            q.saved[INV_STD, c] = 0.0 if var == 0 else 1 / math.sqrt(var)


# Threads -------------------------------------------------------------------------------------------------------------


@_kept
def _share(steps: int, unit: int, last: int, p: _Split, q: _Task) -> None:
    """The steps of some segments, counted through all strips. PREPARE and FINISH are those of whole strips."""
    line, sums = np.zeros(loops.LINE_ROWS * STRIP, q.constants.dtype), np.empty(loops.SUM_ROWS * STRIP)
    kept = np.full(STRIP, loops.MOVES_NO_OTHER if q.frozen else loops.COUNTS, np.uint8)
    while unit < last:
        strip, first = unit // p.segments, unit % p.segments
        end = min(first + last - unit, p.segments)
        c0, c1 = strip * p.block, min((strip + 1) * p.block, p.channels)
        for step in (PREPARE, REDUCE, FINISH, MAP):
            if not steps & step:
                continue
            if step == FINISH:
                _finish(q, c0, c1)
            if step == (PREPARE if q.backward else FINISH):
                for c in range(c0, c1):
                    loops.set_line(q.saved, q.constants, c)
            if step == REDUCE:
                _spread(p, q.origin, c0, c1, sums)
            if step == MAP or (step == REDUCE and not q.as_it_is):
                for k in range(loops.CONSTANTS if q.backward else loops.FORWARD_CONSTANTS):
                    _spread(p, q.constants[k], c0, c1, line[k * STRIP :])
            for n in range(end - first if step in (REDUCE, MAP) else 0):
                segment = first + n if step == REDUCE else end - 1 - n
                if step == REDUCE:
                    sums[STRIP:] = 0.0
                _walk(p, q, step == REDUCE, c0, c1, segment, line, kept, sums)
                for k in range(2 if step == REDUCE else 0):
                    _fold(p, sums[(1 + k) * STRIP :], c0, c1, q.parts[segment, k])
        unit += end - first


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="fastbn")


def _in_parallel(steps: int, threads: int, strips_whole: bool, p: _Split, q: _Task) -> None:
    """Shares the work among threads of Python's, which run compiled code without the GIL.

    Numba's own prange would compile `_share` once more, and LLVM may then fuse and order its operations otherwise: the
    bits would depend on the number of threads.
    """
    length = p.segments if strips_whole else 1
    units = p.strips * p.segments // length
    ends = [units * t // threads * length for t in range(threads + 1)]
    others = [_pool().submit(_share, steps, ends[t], ends[t + 1], p, q) for t in range(1, threads)]
    _share(steps, ends[0], ends[1], p, q)
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
    p, channels, changed = _split(x.shape), x.shape[1], x if dy is None else dy
    absent, to_fill = _input(np.empty(0, x.dtype)), np.empty(0, x.dtype)
    q = _Task(
        x=_input(x), residual=absent if residual is None else _input(residual), dy=absent if dy is None else _input(dy),
        mask=_input(np.empty(0, np.uint8) if mask is None else mask.view(np.uint8)),
        out=to_fill if out is None else out.reshape(-1),
        dresidual=to_fill if dresidual is None else dresidual.reshape(-1),
        origin=saved[MEAN] if origin is None else origin,
        parts=np.empty((p.segments if steps & REDUCE else 0, 2, channels)),
        totals=np.zeros((2, channels)) if sums is None else sums,
        saved=saved, constants=np.empty((loops.CONSTANTS, channels), x.dtype),
        count=float(count), eps=float(eps), activation=int(activation), slope=float(slope),
        backward=dy is not None, frozen=bool(frozen), from_y=bool(from_y),
        as_it_is=mask is None and (dy is None or (activation == IDENTITY and not from_y)),
        in_place=out is not None and out.ctypes.data == changed.ctypes.data,
    )  # fmt: skip
    threads = 1 if thread_count.in_forked_child() else max(1, min(threads, x.size // WORK_PER_THREAD, _MOST_THREADS))
    balanced = 5 * _up(p.strips, threads) * threads <= 7 * p.strips
    if balanced and x.nbytes <= STRIP_BYTES * p.strips:
        _in_parallel(steps, threads, True, p, q)
        return q.totals
    for step in (PREPARE, REDUCE, FINISH, MAP):
        if steps & step:
            _in_parallel(step, threads, step in (PREPARE, FINISH), p, q)
    return q.totals


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
