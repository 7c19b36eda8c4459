"""Which pickles can be read? The number that those of fastbn's objects carry, and what refuses all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .checks import _refuse, kind, shown

FORMAT = 1
"""Of what is written. A release that writes another one still reads this."""


def packed(contents: object) -> tuple[int, object]:
    """The state of a pickle or a copy."""
    return FORMAT, contents


@contextmanager
def unpacked(name: str, state: Any) -> Iterator[Any]:
    """The contents of such a state of the class `name`; a ValueError if the block cannot take them."""
    if not isinstance(state, tuple) or len(state) != 2 or type(state[0]) is not int:
        _refuse(ValueError, name, f"a pickle without a format number ({kind(state)})", f"format {FORMAT}")
    if state[0] != FORMAT:
        _refuse(ValueError, name, f"a pickle of format {shown(state[0])}", f"format {FORMAT}")
    try:
        yield state[1]
    except Exception as error:  # whatever contents that nobody wrote so may lead to
        raise ValueError(
            f"{name}: got a pickle whose contents do not fit ({error}); allowed: format {FORMAT}, as fastbn writes it"
        ) from error
