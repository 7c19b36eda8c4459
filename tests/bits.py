"""Which bits does the C backend give? `python tests/bits.py --record` writes the hash of every call below to bits.txt.

A change that is meant to leave every result alone, such as a rewrite of the kernels, is checked against that file by
test_bits.py. The inputs are raw bits of PCG64, scaled by powers of two, so that no version of NumPy changes them.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastbn

Array = np.ndarray[Any, Any]
FILE = Path(__file__).with_name("bits.txt")
if find_spec("ml_dtypes"):
    import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16

# Bits of a value of each dtype, the exponent of its smallest number, and one near its largest.
FORMATS = {
    "float16": (8, -24, 14),
    "bfloat16": (8, -133, 126),
    "float32": (24, -149, 126),
    "float64": (53, -1074, 1022),
}
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", ("leaky_relu", 0.2), "silu", "hardswish", "sigmoid")
PLANES = (
    (33, 5, 1, 1), (257, 64, 1, 1), (4, 16, 7, 7), (3, 67, 7, 7), (16, 150, 7, 7), (1, 1, 7, 7), (4, 33, 14, 14),
    (9, 64, 14, 14), (2, 1, 14, 14), (4, 16, 28, 28), (9, 20, 28, 28), (5, 3, 9, 13), (2, 7, 3, 1), (1, 4, 3),
    (70, 13, 5, 5), (2, 300, 28), (6, 1, 4, 4), (1000, 50, 2), (2, 3, 111, 113), (1, 2, 65_536),
    (1, 2, 65_537), (2, 1, 70_001), (1, 1, 200_003), (3, 2, 256, 257),
)  # fmt: skip
LAST = (
    (2, 5, 7, 1), (70_001, 1), (2, 9, 11, 3), (40_001, 3), (3, 14, 14, 16), (10_007, 16), (2, 7, 7, 20), (5_003, 20),
    (4, 14, 14, 64), (2_001, 64), (2, 3, 5, 257), (501, 257), (1, 3, 3, 1000), (131, 1000),
)  # fmt: skip
ROWS = ((2, 1), (13, 37), (300, 64), (5_000, 19), (64, 1000), (3, 5))
FIRST = ((5, 3_001), (16, 4, 9, 9), (3, 70_001), (257, 300))
PLACES = tuple((shape, axis) for shapes, axis in ((PLANES, 1), (LAST, -1), (ROWS, 1), (FIRST, 0)) for shape in shapes)
FEW = (((4, 16, 7, 7), 1), ((3, 67, 7, 7), 1), ((2, 5, 28, 28), 1), ((2, 3, 33, 37), 1), ((1, 2, 65_537), 1),
       ((3, 7, 7, 20), -1), ((130, 257), 1))  # fmt: skip
"""Every way through the kernels once, for what varies more than the shape does."""
PLAIN = (((8, 40, 19, 19), 1), ((7, 35, 6, 5), 1), ((2, 9, 8, 8), 1), ((12, 5, 7, 7), 1), ((33, 3, 2, 2), 1),
         ((9, 1030), 1), ((3, 3001), 1), ((1001, 3), 1))  # fmt: skip
"""Ways that calls without a residual take: stacks, joined planes and images, rows in pairs, whole, and short."""


class Case(NamedTuple):
    """The calls that are made on arrays of one shape."""

    shape: tuple[int, ...]
    axis: int
    dtype: str = "float32"
    activation: Any = None
    residual: bool = False
    values: str = "plain"
    way: str = "training"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        activation = self.activation or "identity"
        slope = "" if isinstance(activation, str) else f"-{activation[1]}"
        after = (activation if isinstance(activation, str) else activation[0]) + slope + "+residual" * self.residual
        return f"{shape}/axis{self.axis}/{self.dtype}/{after}/{self.values}/{self.way}"


WAYS = ("frozen", "moments", "in-place", "bare", "sums")
VALUES = ("offset", "exponents", "largest", "smallest", "constant", "nan", "inf")


def cases() -> Iterator[Case]:
    for k, place in enumerate(PLACES):
        yield Case(*place, activation=ACTIVATIONS[k % 8], residual=k % 3 == 0)
        yield Case(*place, activation=ACTIVATIONS[(k + 3) % 8], residual=k % 3 == 1, way="mask")
    for k, place in enumerate(FEW):
        for activation in ACTIVATIONS:
            yield Case(*place, activation=activation, residual=True)
            yield Case(*place, activation=activation, way="frozen", residual=k % 2 == 0)
        for dtype in ("float64", "float16", "bfloat16"):
            for activation in (None, "leaky_relu", "silu", "hardswish"):
                yield Case(*place, dtype, activation, residual=activation != "silu")
            yield Case(*place, dtype, "relu", way="mask")
            yield Case(*place, dtype, values="exponents")
        for values in VALUES:
            yield Case(*place, values=values)
            yield Case(*place, activation="silu", values=values, residual=True)
            yield Case(*place, activation="relu", values=values, way="mask")
        for way in WAYS:
            yield Case(*place, activation=("leaky_relu", 0.25), way=way)
    for place in PLAIN:
        for dtype in FORMATS:
            for activation in (None, "relu"):
                yield Case(*place, dtype, activation)


# Inputs --------------------------------------------------------------------------------------------------------------


def integers(what: str, shape: tuple[int, ...], bits: int) -> Array:
    """Evenly distributed whole numbers from -2**(bits - 1), in float64, which holds them exactly."""
    seed = zlib.crc32(f"{what} {shape}".encode())
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(64 - bits)
    return raw.astype(np.float64).reshape(shape) - 2.0 ** (bits - 1)


def uniform(what: str, shape: tuple[int, ...], dtype: str) -> Array:
    """Exact values of the dtype from -1 up to 1."""
    bits = FORMATS[dtype][0]
    return (integers(what, shape, bits) * 2.0 ** (1 - bits)).astype(dtype)


def values_of(case: Case, what: str) -> Array:
    """An array like x: every channel is along the first axis while it is filled."""
    bits, smallest, largest = FORMATS[case.dtype]
    shape = (case.shape[case.axis], *np.delete(case.shape, case.axis))
    x = integers(f"{what} {case.values}", shape, bits)
    channel = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    plain = 1 - bits
    exponents = {
        "largest": largest + plain,
        "smallest": smallest,
        "exponents": smallest + channel * 37 % (largest + plain - smallest),
    }
    x = np.ldexp(x, exponents.get(case.values, plain))
    if what == "x" and case.values == "offset":
        x += 1000 * (1 + channel)
    if what == "x" and case.values == "constant":
        x[::2] = x[::2].reshape(x[::2].shape[0], -1)[:, :1].reshape(-1, *[1] * (len(shape) - 1))
    x = x.astype(case.dtype)
    if what == "x" and case.values in ("nan", "inf"):
        flat = x.reshape(shape[0], -1)
        flat[0, flat.shape[1] // 2] = float(case.values)
        flat[-1, -1] = -float(case.values)
    return np.ascontiguousarray(np.moveaxis(x, 0, case.axis))


def parameter(what: str, case: Case) -> Array:
    """Of gamma, beta, and the means and variances that are given; some gammas are 0."""
    wide = "float64" if case.dtype == "float64" else "float32"
    found = uniform(what, (case.shape[case.axis],), wide)
    if what == "gamma":
        found[3::7] = 0
    return np.abs(found) + np.asarray(0.5, wide) if what == "var" else found


def mask_of(case: Case) -> Array:
    """Runs and single positions; at least two of them count."""
    rest = tuple(int(size) for size in np.delete(case.shape, case.axis))
    raw = integers("mask", rest, 32)
    runs = integers("runs", rest[:-1], 32)[..., np.newaxis]
    mask = np.where(runs > 0, raw > 0, np.arange(rest[-1]) < rest[-1] * (2 / 3)) & (raw > -(2.0**30))
    mask.flat[[0, -1]] = True
    return mask


# Calls ---------------------------------------------------------------------------------------------------------------


def calls(case: Case) -> tuple[list[Any], list[Any]]:
    """All that the forward calls return or update, and all that the backward calls return."""
    x, dy = values_of(case, "x"), values_of(case, "dy")
    residual = values_of(case, "residual") if case.residual else None
    gamma, beta, mean, var = (parameter(what, case) for what in ("gamma", "beta", "mean", "var"))
    mask = mask_of(case) if case.way == "mask" else None
    here: dict[str, Any] = {"axis": case.axis, "backend": "c"}
    eps = 0.0 if case.values in ("exponents", "largest", "smallest") else 1e-5
    same = {**here, "activation": case.activation, "residual": residual, "eps": eps}
    forward = []
    if case.way in ("training", "frozen"):
        forward.append(fastbn.infer(x, gamma, beta, mean, var, **same))
    if case.way in ("training", "mask"):
        moments = fastbn.moments(x, mask=mask, **here)
        forward += [moments.mean, moments.m2]
    if case.way == "in-place":
        gamma = np.abs(gamma) + np.asarray(0.5, gamma.dtype)
        y, cache = fastbn.forward(x, gamma, beta, mean, var, out=x, **same)
    elif case.way == "bare":
        y, cache = fastbn.forward(x, **same)
    elif case.way == "moments":
        y, cache = fastbn.forward(x, gamma, beta, mean, var, moments=fastbn.Moments(50, mean, 50 * var), **same)
    else:
        y, cache = fastbn.forward(x, gamma, beta, mean, var, training=case.way != "frozen", mask=mask, **same)
    forward += [y, mean, var, cache.mean, cache.var, cache.inv_std]
    sums = fastbn.backward_sums(dy, cache, backend="c")
    got = fastbn.backward(dy, cache, sums=sums if case.way == "sums" else None, backend="c")
    return forward, [sums.sum_dy, sums.sum_dy_xhat, got.dx, got.dgamma, got.dbeta, got.dresidual]


def hashed(arrays: list[Any]) -> str:
    """Of all bits; a NaN is a NaN, whichever one it is."""
    found = sha256()
    for array in arrays:
        if array is not None:
            found.update(np.where(np.isnan(array), np.array(np.nan, array.dtype), array).astype(array.dtype).tobytes())
    return found.hexdigest()[:16]


def recorded() -> dict[str, str]:
    """What bits.txt says."""
    return dict(line.split() for line in FILE.read_text().splitlines())


def found() -> dict[str, str]:
    """The same, of the library that is installed, as it is set now; without bfloat16 where NumPy has none."""
    lines = {}
    with np.errstate(all="ignore"):
        for case in cases():
            if case.dtype != "bfloat16" or find_spec("ml_dtypes"):
                forward, backward = calls(case)
                lines[f"forward/{case}"] = hashed(forward)
                lines[f"{'masked-' * (case.way == 'mask')}backward/{case}"] = hashed(backward)
    return lines


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("python tests/bits.py --record writes tests/bits.txt")
    FILE.write_text("".join(f"{name} {bits}\n" for name, bits in found().items()))
