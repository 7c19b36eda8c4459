"""What does the Numba backend do with one channel, and with one run of memory, in loops that LLVM makes vector code?

A run is at most STRIP elements that lie together: of one channel's plane, or columns of several channels. The constants
of the columns are rows of one array, `line`, each STRIP values long, and so are intermediate results; the sums of the
columns are rows of another, `sums`. A plane has its constants and sums in column 0; LLVM makes two loops of the one
that asks which it is. Distances within an array are known to it, so it need not ask whether the rows overlap.

Loops may fuse a * b + c. Arithmetic with constants of float32 keeps the dtype of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..call.activations import Activation
from . import SAVED_ROWS
from .jit import jit

Array = np.ndarray[Any, Any]

MEAN, MEAN_LOW, VAR, INV_STD, GAMMA, BETA = range(len(SAVED_ROWS))
STRIP = 1024  # the most columns of a run
PRESCALE, NEG_MEAN, SCALE, SHIFT, SHIFT_LOW, ON_DY, ON_X, CONSTANT, POSTSCALE = range(9)  # the constants of a column,
CONSTANTS, FORWARD_CONSTANTS = 9, 5  # and how many of them there are
X, DZ, LINE_ROWS = 9, 10, 11  # further rows of `line`: x or what stands for it; the preactivation, then its gradient
ORIGIN, SUM, PRODUCT, SUM_ROWS = 0, 1, 2, 3  # rows of `sums`: what is subtracted from x, and what is added up
NOTHING, COUNTS, MOVES_NO_OTHER = 0, 1, 2  # what a position is to the gradients, by the mask and dy
IDENTITY, RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH, SIGMOID = map(int, Activation)
ZERO, HALF, ONE, THREE, SIX = (np.float32(value) for value in (0, 0.5, 1, 3, 6))


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """The decorator of every compiled function. Division by zero gives inf."""
    return jit(nogil=True, error_model="numpy", **options)


loop = compiled(fastmath={"contract"})
inline = compiled(fastmath={"contract"}, forceinline=True)
scalar = compiled(forceinline=True)


@inline
def row_of(line: Array, k: int, n: int) -> Array:
    """The first n columns of row k."""
    return line[k * STRIP : k * STRIP + n]


# Constants ----------------------------------------------------------------------------------------------------------


@scalar
def _exponent(v: float) -> int:
    return math.frexp(v)[1] - 1 if v != 0 and math.isfinite(v) else 0


@scalar
def _powers(mean: float, inv_std: float, slope: float, wide: bool) -> tuple[float, float]:
    """Powers of two, 1 for usual channels, that keep x - mean, slope / prescale and dx / postscale in the range."""
    most, usual, high = (1016, 500, 2.0**500) if wide else (120, 60, 2.0**60)
    if 1 / high < abs(inv_std) < high and abs(mean) < high and (1 / high < abs(slope) < high or slope == 0):
        return 1.0, 1.0
    spread, steep = _exponent(inv_std), _exponent(slope)
    e = 0 if -usual <= spread <= usual else spread
    if slope != 0:
        e = max(steep - most, min(e, steep + most))
    if mean != 0:
        e = min(e, most - _exponent(mean))
    post = 0 if -usual <= steep <= usual else max(-most, min(steep, most))
    return math.ldexp(1.0, max(-most, min(e, most))), math.ldexp(1.0, post)


@scalar
def set_moments(origin: Array, totals: Array, count: float, saved: Array, c: int) -> None:
    """Of the batch, from sums about the origin; m2 takes the place of the second. Knuth's two-sum splits the mean."""
    offset = totals[0, c] / count
    mean = origin[c] + offset
    back = mean - origin[c]
    lost = (origin[c] - (mean - back)) + (offset - back)
    m2 = totals[1, c] - totals[0, c] * offset
    totals[1, c] = 0.0 if m2 < 0 else m2
    saved[MEAN, c], saved[MEAN_LOW, c], saved[VAR, c] = mean, lost if lost == lost else 0.0, totals[1, c] / count


@scalar
def set_line(saved: Array, constants: Array, c: int) -> None:
    """For y = ((x - mean_hi) - mean_lo) * inv_std * gamma + beta, where the term of mean_lo moves into the shift."""
    wide, real = constants.itemsize == 8, constants.dtype.type
    most = 1.7976931348623157e308 if wide else 3.4028234663852886e38
    slope, beta = saved[INV_STD, c] * saved[GAMMA, c], saved[BETA, c]
    prescale, postscale = _powers(saved[MEAN, c], saved[INV_STD, c], slope, wide)
    mean_hi, scale = np.float64(real(saved[MEAN, c])), slope / prescale
    moved = ((saved[MEAN, c] - mean_hi) + saved[MEAN_LOW, c]) * slope
    shift = real(beta - moved)
    lost = (beta - np.float64(shift)) - moved
    constants[PRESCALE, c], constants[POSTSCALE, c], constants[NEG_MEAN, c] = prescale, postscale, -mean_hi * prescale
    # Where the exponents cannot all fit in, x is the mean or the result overflows; an infinity would give NaN.
    constants[SCALE, c] = max(-most, min(scale, most)) if math.isfinite(scale) else scale
    constants[SHIFT, c], constants[SHIFT_LOW, c] = shift, lost if lost == lost else 0.0  # beta may be infinite


@scalar
def set_gradient(saved: Array, totals: Array, count: float, constants: Array, c: int) -> None:
    """For dx = A dz + B (x - mean) + D: A = gamma/std, B = -A sum(dz xhat) / (M std), D = -A sum(dz) / M.

    That is Ioffe & Szegedy 2015, section 3, gathered by input. The loops have x - mean_hi, prescaled.
    """
    mean, inv_std = saved[MEAN, c], saved[INV_STD, c]
    mean_lo = (mean - np.float64(constants.dtype.type(mean))) + saved[MEAN_LOW, c]
    on_dy = inv_std * saved[GAMMA, c] / np.float64(constants[POSTSCALE, c])
    on_xhat = -totals[1, c] / count * on_dy
    constants[ON_DY, c] = on_dy
    constants[ON_X, c] = on_xhat * (inv_std / np.float64(constants[PRESCALE, c]))
    constants[CONSTANT, c] = -on_dy * totals[0, c] / count - on_xhat * inv_std * mean_lo


# Sums ---------------------------------------------------------------------------------------------------------------


@loop
def add(gradients: bool, dz: Array, x: Array, kept: Array, sums: Array) -> None:
    """Adds to the sums d and its square, where d is x - origin where x counts, else 0; or dz and dz * d."""
    for k in range(x.size):
        d = np.float64(x[k]) - sums[k] if kept[k] else 0.0
        g = np.float64(dz[k]) if gradients else d
        sums[SUM * STRIP + k] += g
        sums[PRODUCT * STRIP + k] += g * d


@compiled(fastmath={"reassoc"})
def total(values: Array) -> float:
    """In any order, but the same one each time."""
    found = 0.0
    for k in range(values.size):
        found += values[k]
    return found


@compiled(fastmath={"contract", "reassoc"})
def add_plane(gradients: bool, dz: Array, x: Array, kept: Array, sums: Array) -> None:
    """The same where all columns are of one channel: in any order, but the same one each time."""
    origin, total, products = sums[0], 0.0, 0.0
    for k in range(x.size):
        d = np.float64(x[k]) - origin if kept[k] else 0.0
        g = np.float64(dz[k]) if gradients else d
        total += g
        products += g * d
    sums[SUM * STRIP] += total
    sums[PRODUCT * STRIP] += products


@loop
def add_four(gradients: bool, dz: Array, x: Array, start: int, end: int, stride: int, sums: Array) -> None:
    """The same of four rows of which all counts, so that the sums are loaded and stored once for all."""
    n, i, j, m = end - start, start + stride, start + 2 * stride, start + 3 * stride
    x0, x1, x2, x3 = x[start:end], x[i : i + n], x[j : j + n], x[m : m + n]
    g0, g1, g2, g3 = dz[start:end], dz[i : i + n], dz[j : j + n], dz[m : m + n]
    for k in range(n):
        d0, d1 = np.float64(x0[k]) - sums[k], np.float64(x1[k]) - sums[k]
        d2, d3 = np.float64(x2[k]) - sums[k], np.float64(x3[k]) - sums[k]
        a0, a1 = (np.float64(g0[k]), np.float64(g1[k])) if gradients else (d0, d1)
        a2, a3 = (np.float64(g2[k]), np.float64(g3[k])) if gradients else (d2, d3)
        sums[SUM * STRIP + k] += (a0 + a1) + (a2 + a3)
        sums[PRODUCT * STRIP + k] += (a0 * d0 + a1 * d1) + (a2 * d2 + a3 * d3)


# Maps ---------------------------------------------------------------------------------------------------------------


@inline
def _centred(x: Any, line: Array, c: int) -> Any:
    """Prescaled x - mean_hi: exact where x is near the mean, whatever the offset."""
    return x * line[PRESCALE * STRIP + c] + line[NEG_MEAN * STRIP + c]


@loop
def normalize(plane: bool, x: Array, y: Array, line: Array) -> None:
    """Fills y. shift_low is what shift lost to rounding, and is added last: y is near the shift where it matters."""
    for k in range(x.size):
        c = 0 if plane else k
        scaled = _centred(x[k], line, c) * line[SCALE * STRIP + c]
        y[k] = (scaled + line[SHIFT * STRIP + c]) + line[SHIFT_LOW * STRIP + c]


@loop
def normalize_and_add(plane: bool, x: Array, residual: Array, y: Array, line: Array) -> None:
    """The same with a residual. It may cancel the shift, so their sum keeps what its rounding loses (Knuth's two-sum).

    Where the sum is infinite there is nothing to keep.
    """
    for k in range(x.size):
        c = 0 if plane else k
        r, shift = residual[k], line[SHIFT * STRIP + c]
        total = shift + r
        back = total - shift
        lost = ((shift - (total - back)) + (r - back)) + line[SHIFT_LOW * STRIP + c]
        scaled = _centred(x[k], line, c) * line[SCALE * STRIP + c]
        y[k] = (scaled + total) + (lost if lost == lost else ZERO)


@loop
def differentiate(plane: bool, dz: Array, x: Array, dx: Array, line: Array) -> None:
    """Fills dx."""
    for k in range(x.size):
        c = 0 if plane else k
        rest = line[ON_DY * STRIP + c] * dz[k] + line[CONSTANT * STRIP + c]
        dx[k] = (line[ON_X * STRIP + c] * _centred(x[k], line, c) + rest) * line[POSTSCALE * STRIP + c]


@loop
def leave_out(plane: bool, kept: Array, dz: Array, dx: Array, line: Array) -> None:
    """Corrects dx where a position is not in the statistics; such dx need not have been filled."""
    for k in range(dx.size):
        c = 0 if plane else k
        alone = line[ON_DY * STRIP + c] * dz[k] * line[POSTSCALE * STRIP + c]
        dx[k] = dx[k] if kept[k] == COUNTS else alone if kept[k] == MOVES_NO_OTHER else ZERO


@loop
def judge(frozen: bool, kept: Array, dy: Array, dz: Array) -> None:
    """Makes of the mask what each position is to the gradients. Where it is nothing, so is dz, whatever x may be."""
    in_statistics = np.uint8(MOVES_NO_OTHER if frozen else COUNTS)
    for k in range(dy.size):
        kept[k] = in_statistics if kept[k] else MOVES_NO_OTHER if dy[k] != 0 else NOTHING
        dz[k] = dz[k] if kept[k] else ZERO


@loop
def copy(a: Array, b: Array) -> None:
    """Fills b. (An assignment to a slice would compile much more, for its errors.)"""
    for k in range(a.size):
        b[k] = a[k]


# Activations --------------------------------------------------------------------------------------------------------

LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.121944400546905827679e-4  # n * LN2_HIGH is exact
SERIES = np.array([1 / math.factorial(n) for n in range(13, -1, -1)])  # of the exponential
TO_INTEGER = 1.5 * 2.0**52  # when it is added, an integer stands in the last bits of the sum


@inline
def _power_of_two(n: Any) -> float:
    """Two to the n, a whole number between -1022 and 1023, by its bits."""
    bits = np.float64(n + TO_INTEGER).view(np.int64)
    return np.int64((bits + 1023) << 52).view(np.float64)


@inline
def _sigmoids(z: Any, real: Any) -> Any:
    """Of z and of -z, each as accurate as the other, in the dtype `real`. They are made of e = exp(-|z|) <= 1.

    That is two to the n times the power series of what is left, |r| <= log(2) / 2. The power is applied in two steps,
    so that a denormal result is rounded once.
    """
    x = real(-1100) if abs(z) > real(1100) else -abs(z)
    n = np.rint(x * real(LOG2E))
    r = (x - n * real(LN2_HIGH)) - n * real(LN2_LOW)
    total = real(0)
    for i in range(14):
        total = total * r + real(SERIES[i])
    half = np.rint(n * HALF)
    e = total * real(_power_of_two(half)) * real(_power_of_two(n - half))
    larger = ONE / (ONE + e)
    return (e * larger, larger) if z < ZERO else (larger, e * larger)


@loop
def activate(activation: int, y: Array, slope: Any) -> None:
    """Makes y of the preactivation, in its place. A NaN stays one."""
    real = y.dtype.type
    if activation == RELU:
        for k in range(y.size):
            y[k] = ZERO if y[k] < ZERO else y[k]
    elif activation == RELU6:
        for k in range(y.size):
            y[k] = ZERO if y[k] < ZERO else SIX if y[k] > SIX else y[k]
    elif activation == LEAKY_RELU:
        for k in range(y.size):
            y[k] = y[k] if y[k] > ZERO else y[k] * slope
    elif activation == SILU:
        for k in range(y.size):
            y[k] = y[k] * _sigmoids(y[k], real)[0]
    elif activation == HARDSWISH:
        for k in range(y.size):
            gate = y[k] + THREE
            y[k] = y[k] * ((ZERO if gate < ZERO else SIX if gate > SIX else gate) / SIX)
    elif activation == SIGMOID:
        for k in range(y.size):
            y[k] = _sigmoids(y[k], real)[0]


@loop
def activate_gradient(activation: int, dy: Array, dz: Array, slope: Any) -> None:
    """Makes dz of the preactivation, in its place.

    At a kink the slope is the left one; at a NaN dy passes, unless a formula has it.
    """
    real = dz.dtype.type
    if activation == RELU:
        for k in range(dy.size):
            dz[k] = ZERO if dz[k] <= ZERO else dy[k]
    elif activation == RELU6:
        for k in range(dy.size):
            dz[k] = ZERO if dz[k] <= ZERO or dz[k] >= SIX else dy[k]
    elif activation == LEAKY_RELU:
        for k in range(dy.size):
            dz[k] = dy[k] if dz[k] > ZERO else dy[k] * slope
    elif activation == SILU:
        for k in range(dy.size):
            up, down = _sigmoids(dz[k], real)
            dz[k] = dy[k] * (up * (ONE + dz[k] * down))
    elif activation == HARDSWISH:
        for k in range(dy.size):
            z = dz[k]
            dz[k] = ZERO if z <= -THREE else dy[k] if z >= THREE else dy[k] * (z / THREE + HALF)  # NaN at NaN
    elif activation == SIGMOID:
        for k in range(dy.size):
            up, down = _sigmoids(dz[k], real)
            dz[k] = dy[k] * (up * down)
    else:
        copy(dy, dz)


@loop
def deactivate(activation: int, y: Array, residual: Array, z: Array, seen: Array, slope: Any) -> None:
    """Fills z with y, which tells on which side of a kink z was, and `seen` with gamma * xhat + beta.

    The activation was identity or leaky_relu.
    """
    for k in range(y.size):
        z[k] = y[k]
        seen[k] = y[k] / slope if activation == LEAKY_RELU and y[k] <= ZERO else y[k]
    for k in range(residual.size):
        seen[k] -= residual[k]
