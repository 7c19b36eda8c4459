"""Which pickles can be read? Those of fastbn's objects carry a format number, which is checked here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .checks import _refuse, kind, shown

FORMAT = 1
"""The format that is written. A release that writes a later format still reads this one."""


def packed(contents: object) -> tuple[int, object]:
    """The state of a pickle or a copy."""
    return FORMAT, contents


@contextmanager
def unpacked(name: str, state: Any) -> Iterator[Any]:
    """Yields the contents of a state of the class `name`. An error in the `with` block becomes a ValueError."""
    if not isinstance(state, tuple) or len(state) != 2 or type(state[0]) is not int:
        _refuse(ValueError, name, f"a pickle without a format number ({kind(state)})", f"format {FORMAT}")
    if state[0] != FORMAT:
        _refuse(ValueError, name, f"a pickle of format {shown(state[0])}", f"format {FORMAT}")
    try:
        yield state[1]
    except Exception as error:  # contents that fastbn did not write may raise anything
        raise ValueError(
            f"{name}: got a pickle whose contents do not fit ({error}); allowed: format {FORMAT}, as fastbn writes it"
        ) from error


def owned(value: Any) -> Any:
    """An array that was pickled, in memory of its own unless it can be written to and is aligned where it is.

    Pickles of protocol 5 may leave arrays in the buffers in which they came from another process (PEP 574).
    """
    if isinstance(value, np.ndarray) and not (value.flags.writeable and value.flags.aligned):
        return value.copy(order="K")
    return value
