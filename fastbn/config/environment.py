"""What do the environment and the user ask for? Backend, instruction set, and whether what was measured counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from ..call import checks

BACKENDS = ("c", "numba", "numpy")
"""Every backend, best first."""

ISAS = ("baseline", "avx2", "avx512", "neon")
"""Every instruction set that kernels are written for."""

TUNING = ("on", "off")
"""Whether habits that were measured here (fastbn.tune) are used."""

chosen: str | None = None
chosen_here: ContextVar[str | None] = ContextVar("fastbn_backend", default=None)


@cache
def environment_backend() -> str | None:
    """The value of FASTBN_BACKEND, or None."""
    value = os.environ.get("FASTBN_BACKEND")
    return checks.choice("FASTBN_BACKEND", value, BACKENDS) if value else None


@cache
def environment_isa() -> str | None:
    """The value of FASTBN_ISA, or None."""
    value = os.environ.get("FASTBN_ISA")
    return checks.choice("FASTBN_ISA", value, ISAS) if value else None


@cache
def environment_tuning() -> str | None:
    """The value of FASTBN_TUNING, or None."""
    value = os.environ.get("FASTBN_TUNING")
    return checks.choice("FASTBN_TUNING", value, TUNING) if value else None


def backend_name() -> str | None:
    """The backend that the context, the process or the environment asks for, in this order; None if none does."""
    return chosen_here.get() or chosen or environment_backend()


def set_backend_name(name: str) -> None:
    """Sets the process default."""
    global chosen
    chosen = name


@contextmanager
def backend_here(name: str) -> Iterator[None]:
    """Asks for a backend within the `with` block, in this thread or task only."""
    token = chosen_here.set(name)
    try:
        yield
    finally:
        chosen_here.reset(token)
