"""Which dtypes can data have, and what is the statistics dtype of each?"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]

FLOAT32: DType = np.dtype(np.float32)
FLOAT64: DType = np.dtype(np.float64)


class Kind(NamedTuple):
    """The properties of a dtype of data."""

    name: str
    statistics: DType
    """Its statistics dtype."""
    eps: float
    """The distance from 1 to the next number."""
    tiny: float
    """The smallest normal number."""


KINDS = {
    "float16": Kind("float16", FLOAT32, 2.0**-10, 2.0**-14),
    "bfloat16": Kind("bfloat16", FLOAT32, 2.0**-7, 2.0**-126),
    "float32": Kind("float32", FLOAT32, 2.0**-23, 2.0**-126),
    "float64": Kind("float64", FLOAT64, 2.0**-52, 2.0**-1022),
}
"""By name, since bfloat16 is a dtype of ml_dtypes, which is needed only for such data."""


@lru_cache(maxsize=64)  # looking up a dtype's name takes longer than all other checks of a small array
def find(dtype: DType) -> Kind | None:
    """The entry of a dtype, in any byte order; None if data cannot have it."""
    return KINDS.get(dtype.name)


def kind_of(dtype: DType) -> Kind:
    """The entry of a dtype that data can have, in any byte order."""
    return find(dtype) or KINDS[dtype.name]


def native(dtype: DType) -> DType:
    """The dtype in this machine's byte order."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def bfloat16(name: str) -> DType:
    """The dtype bfloat16, for the argument of this name. Importing ml_dtypes registers it with NumPy."""
    try:
        import_module("ml_dtypes")
    except ImportError as error:
        raise ImportError(f'{name}: "bfloat16" needs ml_dtypes: pip install "fastbn[bfloat16]"') from error
    return np.dtype("bfloat16")


def is_float(dtype: DType) -> bool:
    """Whether a parameter (gamma, beta) may have this dtype: any floating point, bfloat16 included."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def rounded(values: Array, dtype: DType) -> Array:
    """Rounds float64 values to the nearest numbers of a dtype for which `is_float` is True.

    To a dtype of ml_dtypes, NumPy would round twice, first to float32. Here this first rounding is to odd, so that the
    second knows on which side of a midpoint a value was.
    """
    if dtype.kind == "f":
        return values.astype(dtype, copy=False)
    single = values.astype(FLOAT32)
    bits = single.view(np.uint32)
    inward = np.nextafter(single, np.where(values > single, np.inf, -np.inf).astype(FLOAT32))
    return np.where((single != values) & (bits & 1 == 0) & np.isfinite(values), inward, single).astype(dtype)
