"""How does Numba compute batch norm? In plain loops (numba_loops.py), compiled on first use and kept on disk.

A call reduces (adds up each channel) and maps (turns the sums into constants, and the constants into y or dx). A strip
is a number of channels, and its rows are runs of memory. Where planes are large, a row is a piece of one channel's
plane. Otherwise it has the columns of as many channels as fit, and of several samples if all channels fit: each column
has its channel's constants and sums of its own. Sums are float64, about a value near the mean, so that a common offset
cancels before anything is squared.

If strips fit into the cache, one thread reduces a strip and maps it. Otherwise all threads reduce first and then map,
from the end, which the cache still holds. Results of given statistics are computed in the order of memory. Strips and
the segments in which their rows are summed follow from the shape alone, and a channel's segments are added in one
order, so that no bit of the result depends on the number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np

from .._moments import blend, save_parameters
from ..call.activations import Activation
from ..call.record import BackwardCall, Call, Options
from ..config import thread_count
from . import SAVED_ROWS
from . import numba_loops as loops
from .numba_loops import BETA, GAMMA, INV_STD, MEAN, MEAN_LOW, SAVED_MEAN, STRIP, SUM, VAR, compiled

DTYPES = frozenset({"float32", "float64"})
Array = np.ndarray[Any, Any]
SEGMENT_ROWS, SEGMENTS_MOST = 64, 64  # rows that a segment has at least, and segments that a strip has at most
PIECE, SMALL, CACHED = 4096, 16, 512  # values in a piece at most, in a plane of a row at least; columns in a cache
STRIP_BYTES, WORK_PER_THREAD = 1 << 22, 32768  # bytes of a strip, and values that are worth waking a thread for
_MOST = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
_pool = functools.cache(lambda: ThreadPoolExecutor(_MOST, thread_name_prefix="fastbn"))

_jit = compiled()
_part = compiled(inline="always")  # of the one function that calls it


class _Split(NamedTuple):
    """How data is cut, which follows from its shape alone."""

    inner: int
    block: int  # channels in a strip
    strips: int
    plane: bool  # a row is a piece of one channel's plane
    span: int  # values in each plane of a row, or 0 if it is mapped column by column
    pieces: int  # in a plane
    length: int  # of a row, but where less is left
    stride: int  # from a row, or plane, to the next
    rows: int  # in a strip
    segment: int  # rows in a segment
    segments: int
    in_order: bool  # rows are mapped in the order of memory: a segment is a row, or a plane
    channel_of: Array  # of each column, in its strip
    position_of: Array  # of each value of a row, in the mask: from that of the first


class _Task(NamedTuple):
    """What a call computes, and its arrays. Arrays of data are flat, and an absent array has no elements."""

    x: Array
    residual: Array
    dy: Array
    mask: Array
    out: Array  # y or dx
    dresidual: Array
    origin: Array  # of the sums of each channel, from x; the mean in a backward call
    chosen: tuple[int, int, int]  # where channel 0 has the values whose median is the origin
    parts: Array  # (2, channels, segments): the sums; no segments where none are taken
    totals: Array  # (2, channels): sum and m2, or dbeta and dgamma
    saved: Array  # (6, channels)
    constants: Array  # (loops.CONSTANTS, channels)
    count: float  # type: ignore[assignment]  # of the values in each channel's statistics
    eps: float
    options: Options
    backward: bool
    frozen: bool
    from_y: bool
    as_it_is: bool  # the sums and dx come of x and dy as they are
    in_place: bool


@functools.lru_cache(maxsize=256)
def _split(shape: tuple[int, int, int], reduces: bool) -> _Split:
    outer, channels, inner = shape
    span, in_order = (inner, not reduces) if inner >= SMALL else (0, False)
    widest, longest = (2 * PIECE, PIECE) if in_order else (STRIP, CACHED)
    plane, block, pieces, repeats = inner > widest // 2, 1, 1, 1
    if plane:  # into equal pieces, if they are not short
        length = next((n for n in range(min(inner, PIECE), PIECE // 2, -1) if inner % n == 0), PIECE)
        pieces = math.ceil(inner / length)
    else:
        block = max(1, min(channels, widest // max(1, inner)))
        if block == channels:
            repeats = max(1, min(outer, longest // max(1, channels * inner)))
        length = repeats * block * inner
    rows = math.ceil(outer / repeats) * pieces
    segment = pieces if in_order else max(SEGMENT_ROWS, math.ceil(rows / SEGMENTS_MOST))
    samples, channel_of, i = (index.ravel() for index in np.indices((repeats, block, length if plane else inner)))
    return _Split(
        inner=inner, block=block, strips=math.ceil(channels / block), plane=plane, span=span, pieces=pieces,
        length=length, stride=repeats * channels * inner, rows=rows, segment=segment,
        segments=max(1, math.ceil(rows / segment)), in_order=in_order, channel_of=channel_of,
        position_of=samples * inner + i,
    )  # fmt: skip


# A strip: channels c0 to c1 ------------------------------------------------------------------------------------------


@loops.scalar
def _run(p: _Split, q: _Task, c0: int, c1: int, row: int) -> tuple[int, int]:
    """Where a row begins, and how long it is."""
    at = row % p.pieces * p.length
    start = row // p.pieces * p.stride + c0 * p.inner + at
    width = p.inner if p.plane else p.length - (p.block - (c1 - c0)) * p.inner
    return start, min(p.length, width - at, q.x.size - start)


@_jit
def _spread(constants: Array, c0: int, channel_of: Array, line: Array) -> None:
    """Gives each column its channel's constants; in a plane, column 0 has those of all."""
    for j in range(len(constants)):
        for k in range(channel_of.size):
            line[j * STRIP + k] = constants[j, c0 + channel_of[k]]


@_jit
def _fold(parts: Array, c0: int, channel_of: Array, span: int, line: Array) -> None:
    """Adds up what the columns of each channel have."""
    for j in range(2):
        for k in range(0, channel_of.size, span):
            first = (SUM + j) * STRIP + k
            added = line[first] if span == 1 else loops.total(line[first : first + min(span, channel_of.size)])
            parts[j, c0 + channel_of[k]] += added


@_jit
def _inputs(
    p: _Split, q: _Task, c0: int, c1: int, r: int, i: int, n: int, own: Array, scaled: bool, work: Array, kept: Array
) -> Any:
    """Returns dz and x of a run (or what replaces x), and fills `kept` by the mask."""
    x, residual, dy, dz, seen = q.x[i : i + n], q.residual[i : i + n], q.dy[i : i + n], work[0, :n], work[1, :n]
    if q.from_y:
        loops.deactivate(q.options.activation, x, residual, dz, seen, work.dtype.type(q.options.slope))
    elif q.options.activation != Activation.IDENTITY and q.backward:
        loops.normalize(p.span, c0, c1, 1, 0, x, residual, dz, n, own, scaled)
    if q.backward:
        loops.activate(q.options.activation, True, dy, dz, work.dtype.type(q.options.slope))
    if q.mask.size:
        first = r // p.pieces * (p.stride // q.saved.shape[1]) + r % p.pieces * p.length
        loops.judge(q.frozen, q.mask[first:], p.position_of, dy, kept[:n], dz)
    return dz, seen if q.from_y else x


@_part
def _reduce(
    p: _Split, q: _Task, c0: int, c1: int, segment: int, own: Array, scaled: bool, line: Array, work: Array, kept: Array
) -> None:
    """Adds up the rows of a segment, one of each quarter at once: processors fetch these ahead on different pages."""
    start, last = segment * p.segment, min(p.rows, (segment + 1) * p.segment)
    samples = (min(last, q.x.size // p.stride * p.pieces) - start) // (4 * p.pieces) if q.as_it_is else 0
    for row in range(start, start + samples * p.pieces):
        i, n = _run(p, q, c0, c1, row)
        if p.plane:
            loops.add(True, 4, samples * p.stride, q.backward, q.dy[i:], q.x[i:], kept[:0], n, line)
        else:
            loops.add(False, 4, samples * p.stride, q.backward, q.dy[i:], q.x[i:], kept[:0], n, line)
    for row in range(start + 4 * samples * p.pieces, last):
        i, n = _run(p, q, c0, c1, row)
        dz, x = q.dy[i : i + n], q.x[i : i + n]
        if not q.as_it_is:
            dz, x = _inputs(p, q, c0, c1, row, i, n, own, scaled, work, kept)
        if p.plane:
            loops.add(True, 1, 0, q.backward, dz, x, kept[:n], n, line)
        else:
            loops.add(False, 1, 0, q.backward, dz, x, kept[:n], n, line)


@_part
def _map(
    p: _Split, q: _Task, c0: int, c1: int, segment: int, own: Array, scaled: bool, work: Array, kept: Array
) -> None:
    """Fills y or dx in the rows of a segment. In place, the loops get a copy, since LLVM's are slow otherwise."""
    start, last = segment * p.segment, min(p.rows, (segment + 1) * p.segment)
    four_at_once = p.length > CACHED and not (p.span or q.backward or q.in_place)
    rest = last - (last - start) % 4 if four_at_once else start
    for row in range(start, rest, 4):
        i, n = _run(p, q, c0, c1, row)
        loops.normalize(p.span, c0, c1, 4, p.stride, q.x[i:], q.residual[i:], q.out[i:], n, own, scaled)
        for at in range(i, i + 4 * p.stride, p.stride):
            loops.activate(q.options.activation, False, q.dy, q.out[at : at + n], work.dtype.type(q.options.slope))
    for row in range(rest, last):
        i, n = _run(p, q, c0, c1, row)
        out, dz, x = q.out[i : i + n], q.dy[i : i + n], q.x[i : i + n]
        if q.backward:
            if not q.as_it_is:
                dz, x = _inputs(p, q, c0, c1, row, i, n, own, scaled, work, kept)
            elif q.in_place:
                dz = loops.copy(dz, work[0, :n])
            if kept.size:
                loops.differentiate_masked(p.span, c0, c1, kept[:n], dz, x, out, own, scaled)
            else:
                loops.differentiate(p.span, c0, c1, kept, dz, x, out, own, scaled)
            loops.copy(dz, q.dresidual[i : i + n])
            continue
        if q.in_place:
            x = loops.copy(x, work[1, :n])
        loops.normalize(p.span, c0, c1, 1, 0, x, q.residual[i : i + n], out, n, own, scaled)
        loops.activate(q.options.activation, False, q.dy, out, work.dtype.type(q.options.slope))


@_part
def _finish(q: _Task, c: int) -> None:
    """Computes a channel's constants from its sums. Threads that share a strip all do so and write the same values."""
    first, second, reduced = q.totals[0, c], q.totals[1, c], q.parts.shape[2] > 0
    if reduced:
        first, second = loops.total(q.parts[0, c]), loops.total(q.parts[1, c])
    if not q.backward:
        if reduced:  # the sums are about the origin; Knuth's two-sum keeps the mean's rounding error
            offset = first / q.count
            mean = q.origin[c] + offset
            back = mean - q.origin[c]
            lost = (q.origin[c] - (mean - back)) + (offset - back)
            second -= first * offset
            second = 0.0 if second < 0 else second if second < math.inf else math.nan  # as `save` says; a NaN stays one
            q.saved[SAVED_MEAN, c], q.saved[VAR, c] = mean, second / q.count
            q.saved[MEAN_LOW, c] = lost if lost == lost else 0.0
        var = q.saved[VAR, c] + q.eps
        q.saved[INV_STD, c] = 0.0 if var == 0 else 1 / math.sqrt(var)
    elif reduced:
        second = (second - first * q.saved[MEAN_LOW, c]) * q.saved[INV_STD, c]
    loops.set_line(q.saved, q.constants, c)
    if q.backward:
        loops.set_gradient(q.saved, q.constants, first, second, q.count, c)
    q.totals[0, c], q.totals[1, c] = first, second


@compiled(cache=True)
def _share(reduces: bool, maps: bool, unit: int, last: int, p: _Split, q: _Task) -> None:
    """Reduces or maps some segments, counted through all strips, or does both to whole strips."""
    begin, longest, lines = unit, max(STRIP, p.length), np.empty((loops.LINE_ROWS, STRIP))
    line, own = lines.reshape(-1), q.constants if p.span else lines
    kept = np.full(longest if q.frozen or q.mask.size else 0, loops.MOVES_NO_OTHER, np.uint8)
    work = np.empty((2, longest), q.x.dtype)
    while unit < last:
        strip, first = (unit % p.strips, unit // p.strips) if p.in_order else (unit // p.segments, unit % p.segments)
        end = first + 1 if p.in_order else min(first + last - unit, p.segments)
        c0, c1 = strip * p.block, min((strip + 1) * p.block, q.saved.shape[1])
        columns = p.channel_of[: 1 if p.plane else p.channel_of.size - (p.block - (c1 - c0)) * p.inner]
        if reduces:
            for c in range(c0, c1):
                if q.backward:
                    loops.set_line(q.saved, q.constants, c)
                else:
                    q.origin[c] = q.constants[MEAN, c] = loops.median(q.x, q.chosen, c * p.inner)
            scaled = q.backward and loops.scales(q.constants, c0, c1, False)
            _spread(q.constants[: loops.FORWARD_CONSTANTS], c0, columns, line)
            for segment in range(first, end):
                line[SUM * STRIP :] = 0.0
                _reduce(p, q, c0, c1, segment, own, scaled, line, work, kept)
                _fold(q.parts[:, :, segment], c0, columns, p.inner, line)
        if maps and (unit == begin or not p.in_order):
            for c in range(q.saved.shape[1]) if p.in_order else range(c0, c1):
                _finish(q, c)
        if maps and q.out.size:
            scaled = loops.scales(q.constants, c0, c1, q.backward)
            if not p.span:
                _spread(q.constants[: loops.CONSTANTS if q.backward else loops.FORWARD_CONSTANTS], c0, columns, line)
            for segment in range(end - 1, first - 1, -1):
                _map(p, q, c0, c1, segment, own, scaled, work, kept)
        unit += end - first


def _in_parallel(threads: int, reduces: bool, maps: bool, p: _Split, q: _Task) -> None:
    """Shares segments, or whole strips, among Python's threads; prange would compile anew, perhaps with other bits."""
    if threads == 1:
        _share(reduces, maps, 0, p.strips * p.segments, p, q)
        return
    length = p.segments if reduces and maps else 1
    ends = [p.strips * p.segments // length * t // threads * length for t in range(threads + 1)]
    others: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # when the interpreter exits it starts no more threads
        others.extend(_pool().submit(_share, reduces, maps, ends[t], ends[t + 1], p, q) for t in range(1, threads))
    for t in (0, *range(len(others) + 1, threads)):
        _share(reduces, maps, ends[t], ends[t + 1], p, q)
    for other in others:
        other.result()


def _flat(array: Array | None, dtype: Any, *, read: bool = True) -> Array:
    """An array as compiled code takes it: flat, and read-only if it is only read, since that is part of the type."""
    flat = np.empty(0, dtype) if array is None else array.reshape(-1)
    flat.flags.writeable = not read
    return flat


@np.errstate(all="ignore")
def _calculate(
    call: Call | BackwardCall, saved: Array, out: Array | None, *, reduces: bool = False, totals: Array | None = None
) -> _Task:
    """Computes each channel's sums, unless `totals` or statistics are given, and fills y or dx if there is `out`."""
    if isinstance(call, Call):
        save_parameters(call, saved)
    x, dtype, dy, backward = call.x, call.x.dtype, getattr(call, "dy", None), isinstance(call, BackwardCall)
    reduces = reduces and x.size > 0
    mask = None if call.mask is None or not (reduces or backward) else call.mask.view(np.uint8)
    (outer, channels, inner), p, from_y = x.shape, _split(x.shape, reduces), bool(getattr(call, "from_y", False))
    counted: Any = range(max(1, outer * inner)) if mask is None or backward else np.flatnonzero(mask)
    chosen = (counted[0], counted[len(counted) // 2], counted[-1]) if reduces else ()
    origins = tuple(n // inner * channels * inner + n % inner for n in chosen) or (0, 0, 0)
    q = _Task(
        x=_flat(x, dtype), residual=_flat(call.residual, dtype), dy=_flat(dy, dtype), mask=_flat(mask, np.uint8),
        out=_flat(out, dtype, read=False), dresidual=_flat(getattr(call, "dresidual", None), dtype, read=False),
        origin=np.empty(channels) if reduces and not backward else saved[SAVED_MEAN], chosen=origins,
        parts=np.zeros((2, channels, p.segments if reduces else 0)),
        totals=np.zeros((2, channels)) if totals is None else np.array(totals),
        saved=saved, constants=np.empty((loops.CONSTANTS, channels)), eps=float(getattr(call, "eps", 0)),
        count=float(getattr(call, "counted", len(counted))), options=call.options, backward=backward,
        frozen=bool(getattr(call, "frozen", False)), from_y=from_y,
        as_it_is=mask is None and (not backward or (not call.options.activation and not from_y)),
        in_place=out is not None and np.may_share_memory(out, x if dy is None else dy),
    )  # fmt: skip
    threads = 1 if thread_count.in_forked_child() else max(1, min(call.threads, x.size // WORK_PER_THREAD, _MOST))
    balanced = 5 * math.ceil(p.strips / threads) * threads <= 7 * p.strips
    together = not reduces or (balanced and x.nbytes <= STRIP_BYTES * p.strips)
    for sums, results in [(reduces, True)] if together else [(True, False), (False, True)]:
        _in_parallel(threads, sums, results, p, q)
    return q


def forward(call: Call) -> None:
    """Ioffe & Szegedy 2015, algorithm 1."""
    done = _calculate(call, call.saved, call.y, reduces=True)
    blend(call, (call.saved[SAVED_MEAN], call.saved[MEAN_LOW], done.totals[1]), int(done.count))


def infer(call: Call) -> None:
    """Ioffe & Szegedy 2015, algorithm 2."""
    saved = np.empty((len(SAVED_ROWS), call.x.shape[1])) if call.saved is None else call.saved
    saved[SAVED_MEAN], saved[MEAN_LOW], saved[VAR] = call.running_mean, 0, call.running_var
    _calculate(call, saved, call.y)


def apply(call: Call) -> None:
    """The same, with the statistics that are in saved."""
    _calculate(call, call.saved, call.y)


def moments(call: Call) -> None:
    """Of the values where mask is True; the mean in two pieces."""
    saved = np.zeros((len(SAVED_ROWS), call.x.shape[1]))
    done = _calculate(call, saved, None, reduces=True)
    call.moments[...] = saved[SAVED_MEAN], saved[MEAN_LOW], done.totals[1]


@np.errstate(all="ignore")
def _known(call: BackwardCall) -> Array:
    """What a backward call knows of its channels.

    With from_y, gamma * xhat + beta stands for x: its mean is beta, its standard deviation gamma, and so the gamma with
    which the slope is still that of x is gamma**2 / std. Rota Bulo et al. 2018, section 3.2.
    """
    saved, known = call.saved, call.saved.copy()
    if call.from_y:
        known[SAVED_MEAN], known[MEAN_LOW] = saved[BETA], 0
        known[INV_STD], known[GAMMA] = 1 / saved[GAMMA], saved[GAMMA] * (saved[GAMMA] * saved[INV_STD])
    return known


def backward_sums(call: BackwardCall) -> None:
    """Of dz, dbeta, and of dz * xhat, dgamma: Ioffe & Szegedy 2015, section 3."""
    call.sums[...] = _calculate(call, _known(call), None, reduces=True).totals


@np.errstate(all="ignore")
def backward(call: BackwardCall) -> None:
    """Ioffe & Szegedy 2015, section 3, the gradients gathered by input."""
    reduces = call.sums is None and not (call.frozen and call.dgamma is None and call.dbeta is None)
    totals = _calculate(call, _known(call), call.dx, reduces=reduces, totals=call.sums).totals
    for gradient, total in zip((call.dbeta, call.dgamma), totals, strict=True):
        if gradient is not None:
            gradient[...] = total


def describe() -> dict[str, str]:
    """For show_config()."""
    return {"version": numba.__version__, "threads": "Python's, without the GIL", "most threads": str(_MOST)}
