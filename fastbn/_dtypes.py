"""Which dtypes can data have, and what are their statistics kept in?"""

from __future__ import annotations

from typing import Any

import numpy as np

DType = np.dtype[Any]

FLOAT32: DType = np.dtype(np.float32)
FLOAT64: DType = np.dtype(np.float64)

STATISTICS: dict[DType, DType] = {FLOAT32: FLOAT32, FLOAT64: FLOAT64}
"""Data dtype -> statistics dtype, for every dtype that data can have."""

PLANNED = ("float16", "bfloat16")
"""In the contract, but not in this version."""


def is_float(dtype: DType) -> bool:
    """Whether a parameter (gamma, beta) may have this dtype: any floating point, bfloat16 included."""
    return dtype.kind == "f" or dtype.name == "bfloat16"
