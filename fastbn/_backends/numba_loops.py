"""What does batch norm do with one channel, and with one run of memory? In loops that LLVM turns into vector code.

A run is elements that lie together: a piece of one channel's plane, or at most STRIP columns of several channels. The
constants and the sums of its columns are the rows of one array, `line`, each STRIP values long: LLVM knows distances
within an array, so it need not check whether the rows overlap. In a plane all columns have the constants and sums of
column 0. LLVM makes two loops of one that asks whether it is in a plane.

Arithmetic is float64, and its result is rounded once, so an offset of float32 data costs no digits, and no exponent
leaves the range. a * b + c may be fused. Only the smooth activations are computed in the dtype of the data.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from ..call.activations import Activation
from . import SAVED_ROWS
from .jit import jit

Array = np.ndarray[Any, Any]

STRIP = 1024  # the most columns of a run
SAVED_MEAN, MEAN_LOW, VAR, INV_STD, GAMMA, BETA = range(len(SAVED_ROWS))
# The rows of `line`: constants, then sums.
MEAN, POWER, SCALE, SHIFT, POWER_OF_X, ON_X, CONSTANT, SUM, PRODUCT = range(9)
FORWARD_CONSTANTS, CONSTANTS, LINE_ROWS = 4, 7, 9
SMALL, LARGE = 2.0**-900, 2.0**900
LEAST_NORMAL = float(np.finfo(np.float64).tiny)
NOTHING, COUNTS, MOVES_NO_OTHER = 0, 1, 2  # what a position is to the gradients, by the mask and dy
ZERO, HALF, ONE, THREE, SIX = (np.float32(value) for value in (0, 0.5, 1, 3, 6))
NO_BOUND = np.float32(math.nan)  # no number is greater

compiled = partial(jit, nogil=True, error_model="numpy")  # of every function; division by zero gives inf
loop = compiled(fastmath={"contract"})
inline = compiled(fastmath={"contract"}, forceinline=True)
scalar = compiled(forceinline=True)


@scalar
def median(x: Array, places: tuple[int, int, int], start: int) -> float:
    """The median of three values, so that one outlier does not matter, or 0 if it is not finite."""
    a, b, c = x[start + places[0]], x[start + places[1]], x[start + places[2]]
    low, high = (b, a) if a > b else (a, b)
    middle = np.float64(high if high < c else c if low < c else low)
    return middle if math.isfinite(middle) else 0.0


@scalar
def set_line(saved: Array, constants: Array, c: int) -> None:
    """For y = (x - mean - mean_low) * gamma / std + beta, where the term of mean_low moves into the shift.

    Where gamma / std is no normal number, though y may be one, it is divided by a power of two, by which x - mean is
    multiplied.
    """
    inv_std, gamma, power = saved[INV_STD, c], saved[GAMMA, c], 1.0
    gain = inv_std * gamma
    if not LEAST_NORMAL <= abs(gain) < math.inf and 0 < inv_std < math.inf and 0 < abs(gamma) < math.inf:
        exponent = math.frexp(inv_std)[1] + math.frexp(gamma)[1]
        power = math.ldexp(1.0, exponent + 1000 if exponent < 0 else exponent - 1000)
        gain = inv_std / power * gamma
    constants[MEAN, c], constants[POWER, c], constants[SCALE, c] = saved[SAVED_MEAN, c], power, gain
    constants[SHIFT, c] = saved[BETA, c] - saved[MEAN_LOW, c] * power * gain


@scalar
def set_gradient(saved: Array, constants: Array, dbeta: float, dgamma: float, count: float, c: int) -> None:
    """For dx = A dz + B (x - mean) + D: A = gamma / std, B = -A dgamma / (M std), D = -A dbeta / M.

    That is Ioffe & Szegedy 2015, section 3, gathered by input. D has the term of mean_low, too. All three are divided
    by the power of two of A. Where B is large or small, x - mean is multiplied by one that is about 1 / std.
    """
    inv_std, scale, power = saved[INV_STD, c], constants[SCALE, c], 1.0
    of_xhat = -dgamma / count * scale
    if of_xhat != 0 and not SMALL < abs(of_xhat * inv_std) < LARGE and 0 < inv_std < math.inf:
        power = math.ldexp(1.0, math.frexp(inv_std)[1])
    on_x = of_xhat * (inv_std / power)
    constants[POWER_OF_X, c], constants[ON_X, c] = power, on_x
    constants[CONSTANT, c] = -scale * dbeta / count - on_x * (saved[MEAN_LOW, c] * power)


@scalar
def scales(constants: Array, c0: int, c1: int, backward: bool) -> bool:
    """Whether any of these channels has a power of two other than 1."""
    found = False
    for c in range(c0, c1):
        found |= constants[POWER, c] != 1 or (backward and constants[POWER_OF_X, c] != 1)
    return found


# Loops over a run ----------------------------------------------------------------------------------------------------

_distance = inline(lambda x, mean: np.float64(x) - mean)  # of its own, so that `add` does not reorder it


@compiled(fastmath={"reassoc", "contract"}, forceinline=True)
def add(plane: bool, rows: int, step: int, pairs: bool, dz: Array, x: Array, kept: Array, n: int, line: Array) -> None:
    """Adds d and d * d, or dz and dz * d, to the sums of n columns; d is x - mean, or 0 where x does not count.

    It adds `rows` rows, a constant, that begin `step` apart: the sums are loaded and stored once for all of them. In a
    plane, column 0 has the sums of all, added in any order, which is the same one each time.
    """
    of_plane, products_of_plane = 0.0, 0.0
    for k in range(n):
        mean, total, products = line[MEAN * STRIP + (0 if plane else k)], 0.0, 0.0
        for row in range(rows):
            at = np.uint64(row * step + k)  # of this type, since an index that may be negative costs the vectors
            d = _distance(x[at], mean)
            if kept.size and not kept[k]:
                d = 0.0
            g = np.float64(dz[at]) if pairs else d
            total += g
            products += g * d
        if plane:
            of_plane += total
            products_of_plane += products
        else:
            line[SUM * STRIP + k] += total
            line[PRODUCT * STRIP + k] += products
    line[SUM * STRIP] += of_plane
    line[PRODUCT * STRIP] += products_of_plane


@compiled(fastmath={"reassoc"})
def total(values: Array) -> float:
    """The sum in any order, which is the same one each time."""
    found = 0.0
    for k in range(values.size):
        found += values[k]
    return found


@loop
def normalize(
    span: int,
    c0: int,
    c1: int,
    rows: int,
    step: int,
    x: Array,
    residual: Array,
    z: Array,
    n: int,
    constants: Array,
    scaled: bool,
) -> None:
    """Fills z, the argument of the activation, in n columns of `rows` rows, a constant, that begin `step` apart."""
    first, c = 0, c0
    while first < n:
        last = min(first + span, n) if span else n
        for k in range(last - first):
            j = c if span else k
            mean, scale, shift = constants[MEAN, j], constants[SCALE, j], constants[SHIFT, j]
            for row in range(rows):
                at = np.uint64(row * step + first + k)
                d = (x[at] - mean) * constants[POWER, j] if scaled else x[at] - mean
                z[at] = d * scale + (shift + residual[at] if residual.size else shift)
        first, c = last, c + 1 if c + 1 < c1 else c0


def _differentiate(
    span: int, c0: int, c1: int, kept: Array, dz: Array, x: Array, dx: Array, constants: Array, scaled: bool
) -> None:
    """Fills dx."""
    first, c = 0, c0
    while first < x.size:
        last = min(first + span, x.size) if span else x.size
        for k in range(last - first):
            j, at = c if span else k, np.uint64(first + k)
            d = x[at] - constants[MEAN, j]
            if scaled:
                d *= constants[POWER_OF_X, j]
            through_statistics = constants[ON_X, j] * d + constants[CONSTANT, j]
            what = kept[at] if kept.size else np.uint8(COUNTS)
            own = constants[SCALE, j] * dz[at]
            result = (own if what != NOTHING else 0.0) + (through_statistics if what == COUNTS else 0.0)
            dx[at] = result * constants[POWER, j] if scaled else result
        first, c = last, c + 1 if c + 1 < c1 else c0


differentiate = loop(_differentiate)
differentiate_masked = compiled()(_differentiate)
"""Where a mask chooses among the terms, LLVM fuses them in some loops and not in others, so that a channel's last bits
would depend on whether another has a power of two."""


@loop
def judge(frozen: bool, mask: Array, positions: Array, dy: Array, kept: Array, dz: Array) -> None:
    """Fills `kept` by the mask: any byte but 0 is True. Where a position is NOTHING, dz is 0, whatever x is."""
    in_statistics = np.uint8(MOVES_NO_OTHER if frozen else COUNTS)
    for k in range(kept.size):
        moves = dy.size > 0 and dy[k] != 0
        kept[k] = in_statistics if mask[positions[k]] else MOVES_NO_OTHER if moves else NOTHING
        dz[k] = dz[k] if kept[k] else ZERO


@loop
def copy(a: Array, b: Array) -> Array:
    """Fills and returns b, which may have no elements. (An assignment to a slice takes longer to compile.)"""
    for k in range(b.size):
        b[k] = a[k]
    return b


# Activations ---------------------------------------------------------------------------------------------------------

LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.121944400546905827679e-4  # n * LN2_HIGH is exact
SERIES = np.array([1 / math.factorial(n) for n in range(13, -1, -1)])  # of the exponential
TO_INTEGER = 1.5 * 2.0**52  # when it is added, an integer stands in the last bits of the sum


@inline
def _power_of_two(n: Any) -> float:
    """Two to the n, a whole number between -1022 and 1023, made from its bits."""
    bits = np.float64(n + TO_INTEGER).view(np.int64)
    return np.int64((bits + 1023) << 52).view(np.float64)


@inline
def _sigmoids(z: Any, real: Any) -> Any:
    """The sigmoids of z and of -z, equally accurate, in the dtype `real`. Both follow from e = exp(-|z|) <= 1.

    e is two to the n times the power series of the rest, |r| <= log(2) / 2. The power of two is applied twice, so
    that a denormal result is rounded once.
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
def activate(activation: int, gradients: bool, dy: Array, z: Array, slope: Any) -> None:
    """Replaces z by the activation of z, or by dy times its derivative.

    A NaN stays a NaN. At a kink the derivative is the left one. At a NaN dy passes, unless z is in the formula.
    """
    if activation in (Activation.RELU, Activation.RELU6):
        most = SIX if activation == Activation.RELU6 else NO_BOUND
        for k in range(z.size):
            if gradients:
                z[k] = ZERO if z[k] <= ZERO or z[k] >= most else dy[k]
            else:
                z[k] = ZERO if z[k] < ZERO else most if z[k] > most else z[k]
    elif activation == Activation.LEAKY_RELU:
        for k in range(z.size):
            given = dy[k] if gradients else z[k]
            z[k] = given if z[k] > ZERO else given * slope
    elif activation == Activation.HARDSWISH:
        for k in range(z.size):
            if gradients:  # NaN at NaN
                z[k] = ZERO if z[k] <= -THREE else dy[k] if z[k] >= THREE else dy[k] * (z[k] / THREE + HALF)
            else:
                gate = z[k] + THREE
                z[k] = z[k] * ((ZERO if gate < ZERO else SIX if gate > SIX else gate) / SIX)
    elif activation == Activation.SILU or activation == Activation.SIGMOID:
        for k in range(z.size):
            up, down = _sigmoids(z[k], z.dtype.type)
            if gradients:
                z[k] = dy[k] * (up * (ONE + z[k] * down if activation == Activation.SILU else down))
            else:
                z[k] = (z[k] if activation == Activation.SILU else ONE) * up
    elif gradients:
        copy(dy, z)


@loop
def deactivate(activation: int, y: Array, residual: Array, z: Array, seen: Array, slope: Any) -> None:
    """Fills z with y, which tells on which side of a kink z was, and `seen` with gamma * xhat + beta.

    The activation was identity or leaky_relu.
    """
    for k in range(y.size):
        z[k] = y[k]
        seen[k] = y[k] / slope if activation == Activation.LEAKY_RELU and y[k] <= ZERO else y[k]
    for k in range(residual.size):
        seen[k] -= residual[k]
