"""What does the Numba backend do with one channel, and with one run of memory, in loops that LLVM makes vector code?

A run is at most STRIP elements that lie together: columns of one or more channels, or a piece of one channel's plane.
The constants of the columns are rows of one array, `line`, each STRIP values long, and so are intermediate results;
the sums of the columns are rows of another, `sums`. A plane has its constants and sums in column 0. Distances within
an array are known when the loop is compiled, so LLVM need not ask whether its rows overlap.

Loops may fuse a * b + c, and add up a plane in any order, but the same one each time.
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
X, Z, DZ, LINE_ROWS = 9, 10, 11, 12  # further rows of `line`: x or what stands for it, the preactivation, its gradient
ORIGIN, SUM, PRODUCT, SUM_ROWS = 0, 1, 2, 3  # rows of `sums`: what is subtracted from x, and what is added up
NOTHING, COUNTS, MOVES_NO_OTHER = 0, 1, 2  # what a position is to the gradients, by the mask and dy
IDENTITY, RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH, SIGMOID = map(int, Activation)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """The decorator of every compiled function. Division by zero gives inf."""
    return jit(nogil=True, error_model="numpy", **options)


scalar = compiled(forceinline=True)
loop = compiled(fastmath={"contract"})
sum_loop = compiled(fastmath={"contract", "reassoc"})
inline = compiled(fastmath={"contract"}, forceinline=True)


@inline
def row_of(line: Array, k: int, n: int) -> Array:
    """The first n columns of row k."""
    return line[k * STRIP : k * STRIP + n]


@inline
def _its_own(k: int) -> int:
    return k


@inline
def _that_of_all(k: int) -> int:
    return 0


def for_columns_and_planes(make: Callable[[Any], Any]) -> Any:
    """A loop over columns and one over a plane: `make` gets a function that tells which column has k's constants."""
    in_columns, in_plane = make(_its_own), make(_that_of_all)

    @inline
    def either(plane: bool, *arrays: Any) -> None:
        if plane:
            in_plane(*arrays)
        else:
            in_columns(*arrays)

    return either


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


def _adding(gradients: bool) -> Any:
    """Loops that add to the sums dz and dz * d, where d is x - origin where x counts, else 0; or d and its square.

    One row; four of which all counts, so that the sums are loaded and stored once for all; a piece of a plane.
    """

    @loop
    def add_row(dz: Array, x: Array, kept: Array, sums: Array) -> None:
        for k in range(x.size):
            d = np.float64(x[k]) - sums[k] if kept[k] else 0.0
            g = np.float64(dz[k]) if gradients else d
            sums[SUM * STRIP + k] += g
            sums[PRODUCT * STRIP + k] += g * d

    @loop
    def add_four(dz: tuple[Array, ...], x: tuple[Array, ...], sums: Array) -> None:
        (g0, g1, g2, g3), (x0, x1, x2, x3) = dz, x
        for k in range(x0.size):
            d0, d1 = np.float64(x0[k]) - sums[k], np.float64(x1[k]) - sums[k]
            d2, d3 = np.float64(x2[k]) - sums[k], np.float64(x3[k]) - sums[k]
            a0, a1 = (np.float64(g0[k]), np.float64(g1[k])) if gradients else (d0, d1)
            a2, a3 = (np.float64(g2[k]), np.float64(g3[k])) if gradients else (d2, d3)
            sums[SUM * STRIP + k] += (a0 + a1) + (a2 + a3)
            sums[PRODUCT * STRIP + k] += (a0 * d0 + a1 * d1) + (a2 * d2 + a3 * d3)

    @sum_loop
    def add_plane(dz: Array, x: Array, kept: Array, sums: Array) -> None:
        origin, total, products = sums[0], 0.0, 0.0
        for k in range(x.size):
            d = np.float64(x[k]) - origin if kept[k] else 0.0
            g = np.float64(dz[k]) if gradients else d
            total += g
            products += g * d
        sums[SUM * STRIP] += total
        sums[PRODUCT * STRIP] += products

    return add_row, add_four, add_plane


_add_row, _add_four, _add_plane = _adding(False)
_add_gradient_row, _add_four_gradients, _add_gradient_plane = _adding(True)


@inline
def add(gradients: bool, plane: bool, dz: Array, x: Array, kept: Array, sums: Array) -> None:
    """Adds a run to the sums."""
    if gradients and plane:
        _add_gradient_plane(dz, x, kept, sums)
    elif gradients:
        _add_gradient_row(dz, x, kept, sums)
    elif plane:
        _add_plane(dz, x, kept, sums)
    else:
        _add_row(dz, x, kept, sums)


@inline
def add_four(gradients: bool, dz: tuple[Array, ...], x: tuple[Array, ...], sums: Array) -> None:
    """Adds four rows to the sums."""
    if gradients:
        _add_four_gradients(dz, x, sums)
    else:
        _add_four(dz, x, sums)


# Maps ---------------------------------------------------------------------------------------------------------------


@inline
def _centred(x: Any, line: Array, c: int) -> Any:
    """Prescaled x - mean_hi: exact where x is near the mean, whatever the offset."""
    return x * line[PRESCALE * STRIP + c] + line[NEG_MEAN * STRIP + c]


@for_columns_and_planes
def normalize(column: Any) -> Any:
    """Fills y. shift_low is what shift lost to rounding, and is added last: y is near the shift where it matters."""

    @loop
    def fill(x: Array, y: Array, line: Array) -> None:
        for k in range(x.size):
            c = column(k)
            d = _centred(x[k], line, c)
            y[k] = (d * line[SCALE * STRIP + c] + line[SHIFT * STRIP + c]) + line[SHIFT_LOW * STRIP + c]

    return fill


@for_columns_and_planes
def normalize_and_add(column: Any) -> Any:
    """The same with a residual. It may cancel the shift, so their sum keeps what its rounding loses (Knuth's two-sum).

    Where the sum is infinite there is nothing to keep.
    """

    @loop
    def fill(x: Array, residual: Array, y: Array, line: Array) -> None:
        for k in range(x.size):
            c, r = column(k), residual[k]
            d, shift = _centred(x[k], line, c), line[SHIFT * STRIP + c]
            total = shift + r
            back = total - shift
            lost = ((shift - (total - back)) + (r - back)) + line[SHIFT_LOW * STRIP + c]
            y[k] = (d * line[SCALE * STRIP + c] + total) + (lost if lost == lost else ZERO)

    return fill


@for_columns_and_planes
def differentiate(column: Any) -> Any:
    """Fills dx."""

    @loop
    def fill(dz: Array, x: Array, dx: Array, line: Array) -> None:
        for k in range(x.size):
            c = column(k)
            rest = line[ON_DY * STRIP + c] * dz[k] + line[CONSTANT * STRIP + c]
            dx[k] = (line[ON_X * STRIP + c] * _centred(x[k], line, c) + rest) * line[POSTSCALE * STRIP + c]

    return fill


@for_columns_and_planes
def differentiate_frozen(column: Any) -> Any:
    """The same where the statistics are given: x is not read."""

    @loop
    def fill(dz: Array, dx: Array, line: Array) -> None:
        for k in range(dz.size):
            dx[k] = line[ON_DY * STRIP + column(k)] * dz[k] * line[POSTSCALE * STRIP + column(k)]

    return fill


@for_columns_and_planes
def leave_out(column: Any) -> Any:
    """Corrects dx where the mask is False."""

    @loop
    def correct(kept: Array, dz: Array, dx: Array, line: Array) -> None:
        for k in range(dx.size):
            alone = line[ON_DY * STRIP + column(k)] * dz[k] * line[POSTSCALE * STRIP + column(k)]
            dx[k] = dx[k] if kept[k] == COUNTS else alone if kept[k] == MOVES_NO_OTHER else ZERO

    return correct


@loop
def judge(kept: Array, dy: Array, dz: Array) -> None:
    """Makes of the mask what each position is to the gradients. Where it is nothing, so is dz, whatever x may be."""
    for k in range(dy.size):
        kept[k] = COUNTS if kept[k] else MOVES_NO_OTHER if dy[k] != 0 else NOTHING
        dz[k] = dz[k] if kept[k] else ZERO


@loop
def copy(a: Array, b: Array) -> None:
    """Fills b. (An assignment to a slice would compile much more, for its errors.)"""
    for k in range(a.size):
        b[k] = a[k]


# Activations --------------------------------------------------------------------------------------------------------

# Arithmetic with float32 keeps the dtype of the data, be it float32 or float64.
ZERO, HALF, ONE, THREE, SIX = (np.float32(value) for value in (0, 0.5, 1, 3, 6))
LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.121944400546905827679e-4  # n * LN2_HIGH is exact
TO_INTEGER = 1.5 * 2.0**52  # when it is added, a small number is rounded to an integer, in the last bits


@inline
def _power_of_two(n: float) -> float:
    """Two to the n, a whole number between -1022 and 1023, by its bits."""
    bits = np.float64(n + TO_INTEGER).view(np.int64)
    return np.int64((bits + 1023) << 52).view(np.float64)


@inline
def _exp(x: float) -> Any:
    """The exponential of x <= 0 to an ulp: two to the n times the power series of what is left, |r| <= log(2) / 2.

    The power is applied in two steps, so that a denormal result is rounded once.
    """
    x = -1100.0 if x < -1100.0 else x
    n = (x * LOG2E + TO_INTEGER) - TO_INTEGER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    s = r * r
    low = ((r * (1 / 5040) + 1 / 720) * s + (r * (1 / 120) + 1 / 24)) * s + (r * (1 / 6) + 1 / 2)
    high = (r * (1 / 6227020800) + 1 / 479001600) * s + (r * (1 / 39916800) + 1 / 3628800)
    high = high * s + (r * (1 / 362880) + 1 / 40320)
    total = ((high * (s * s * s) + low) * s + r) + 1
    half = (n * 0.5 + TO_INTEGER) - TO_INTEGER
    return total * _power_of_two(half) * _power_of_two(n - half)


@inline
def _sigmoids(z: Any) -> tuple[float, float]:
    """Of z and of -z, in float64, each as accurate as the other; exp(-|z|) cannot overflow."""
    e = _exp(-abs(np.float64(z)))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return (smaller if z < 0 else larger), (larger if z < 0 else smaller)


def _activation(activation: int) -> Any:
    """The loop that fills y. A NaN stays one."""

    @loop
    def fill(z_: Array, y: Array, slope: Any) -> None:
        for k in range(z_.size):
            z = z_[k]
            if activation == RELU:
                y[k] = ZERO if z < ZERO else z
            elif activation == RELU6:
                y[k] = ZERO if z < ZERO else SIX if z > SIX else z
            elif activation == LEAKY_RELU:
                y[k] = z if z > ZERO else z * slope
            elif activation == SILU:
                y[k] = z * _sigmoids(z)[0]
            elif activation == HARDSWISH:
                gate = z + THREE
                y[k] = z * ((ZERO if gate < ZERO else SIX if gate > SIX else gate) / SIX)
            elif activation == SIGMOID:
                y[k] = _sigmoids(z)[0]
            else:
                y[k] = z

    return fill


def _derivative(activation: int) -> Any:
    """The loop that fills dz; the slope at kinks is PyTorch's. At NaN dy passes, unless z is in the slope's formula."""

    @loop
    def fill(dy: Array, z_: Array, dz: Array, slope: Any) -> None:
        for k in range(dy.size):
            z = z_[k]
            if activation == RELU:
                dz[k] = ZERO if z <= ZERO else dy[k]
            elif activation == RELU6:
                dz[k] = ZERO if z <= ZERO or z >= SIX else dy[k]
            elif activation == LEAKY_RELU:
                dz[k] = dy[k] if z > ZERO else dy[k] * slope
            elif activation == SILU:
                up, down = _sigmoids(z)
                dz[k] = dy[k] * (up * (1.0 + z * down))
            elif activation == HARDSWISH:
                dz[k] = ZERO if z <= -THREE else dy[k] if z >= THREE else dy[k] * (z / THREE + HALF)
            elif activation == SIGMOID:
                up, down = _sigmoids(z)
                dz[k] = dy[k] * (up * down)
            else:
                dz[k] = dy[k]

    return fill


def _chosen(make: Callable[[int], Any]) -> Any:
    """A function that chooses among the loops of the activations."""
    identity, relu, relu6, leaky_relu, silu, hardswish, sigmoid = map(make, range(len(Activation)))

    @loop
    def choose(activation: int, *arguments: Any) -> None:
        if activation == IDENTITY:
            identity(*arguments)
        elif activation == RELU:
            relu(*arguments)
        elif activation == RELU6:
            relu6(*arguments)
        elif activation == LEAKY_RELU:
            leaky_relu(*arguments)
        elif activation == SILU:
            silu(*arguments)
        elif activation == HARDSWISH:
            hardswish(*arguments)
        else:
            sigmoid(*arguments)

    return choose


activate, activate_gradient = _chosen(_activation), _chosen(_derivative)


@loop
def deactivate(activation: int, y: Array, z: Array, slope: Any) -> None:
    """Fills z, of which the activation made y: identity or leaky_relu."""
    for k in range(y.size):
        z[k] = y[k] / slope if activation == LEAKY_RELU and y[k] <= ZERO else y[k]
