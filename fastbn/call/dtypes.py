"""Which dtypes can data have, and what are their statistics kept in?"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]

FLOAT32: DType = np.dtype(np.float32)
FLOAT64: DType = np.dtype(np.float64)


class Kind(NamedTuple):
    """What is particular to a dtype of data."""

    name: str
    statistics: DType
    """Its statistics dtype."""
    eps: float
    """The distance from 1 to the next number."""
    tiny: float
    """The smallest number that has all its digits."""


KINDS = {
    "float16": Kind("float16", FLOAT32, 2.0**-10, 2.0**-14),
    "bfloat16": Kind("bfloat16", FLOAT32, 2.0**-7, 2.0**-126),
    "float32": Kind("float32", FLOAT32, 2.0**-23, 2.0**-126),
    "float64": Kind("float64", FLOAT64, 2.0**-52, 2.0**-1022),
}
"""By name, since bfloat16 is a dtype of ml_dtypes, which only those need who have such data."""


@lru_cache(maxsize=64)  # a dtype's name takes longer than all else that is asked about a small array
def find(dtype: DType) -> Kind | None:
    """The entry of a dtype, in any byte order; None if data cannot have it."""
    return KINDS.get(dtype.name)


def kind_of(dtype: DType) -> Kind:
    """The entry of a dtype that data can have, in any byte order."""
    return find(dtype) or KINDS[dtype.name]


def native(dtype: DType) -> DType:
    """The dtype in this machine's byte order."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def is_float(dtype: DType) -> bool:
    """Whether a parameter (gamma, beta) may have this dtype: any floating point, bfloat16 included."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def rounded(values: Array, dtype: DType) -> Array:
    """Float64 values, to the nearest numbers of a dtype that `is_float`.

    NumPy would round twice to a dtype of ml_dtypes, by way of float32; here float32 is rounded to odd, so that the last
    rounding sees on which side of a midpoint the value was.
    """
    if dtype.kind == "f":
        return values.astype(dtype, copy=False)
    single = values.astype(FLOAT32)
    bits = single.view(np.uint32)
    inward = np.nextafter(single, np.where(values > single, np.inf, -np.inf).astype(FLOAT32))
    return np.where((single != values) & (bits & 1 == 0) & np.isfinite(values), inward, single).astype(dtype)
