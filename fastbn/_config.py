"""What do the environment and the user ask for? Backend, threads and instruction set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from . import _check

BACKENDS = ("c", "numba", "numpy")
"""Every backend, best first."""

ISAS = ("baseline", "avx2", "avx512", "neon")
"""Every instruction set that kernels are written for."""

MOST_THREADS = 2**31 - 1
"""As many as an int of C can count."""

_backend: str | None = None
_threads: int | None = None
_backend_here: ContextVar[str | None] = ContextVar("fastbn_backend", default=None)
_threads_here: ContextVar[int | None] = ContextVar("fastbn_num_threads", default=None)
_forked = False


def _after_fork() -> None:
    """A forked child has none of its parent's OpenMP threads, and GNU OpenMP would wait for them for ever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def in_forked_child() -> bool:
    """Whether this process was forked after fastbn was imported; such a process runs on one thread."""
    return _forked


@cache
def environment_backend() -> str | None:
    """FASTBN_BACKEND."""
    value = os.environ.get("FASTBN_BACKEND")
    return _check.choice("FASTBN_BACKEND", value, BACKENDS) if value else None


@cache
def environment_isa() -> str | None:
    """FASTBN_ISA."""
    value = os.environ.get("FASTBN_ISA")
    return _check.choice("FASTBN_ISA", value, ISAS) if value else None


@cache
def environment_threads() -> int:
    """FASTBN_NUM_THREADS, else OMP_NUM_THREADS (whose first number counts), else the processors we may use."""
    for name in ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name)
        if value:
            first = value.split(",")[0].strip() if name == "OMP_NUM_THREADS" else value.strip()
            if not first.isdecimal() or int(first) < 1:
                raise ValueError(f"{name}: got {value!r}; allowed: a positive integer")
            return min(int(first), MOST_THREADS)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def backend_name() -> str | None:
    """The backend asked for by the context, the process or the environment, in that order; None if by none."""
    return _backend_here.get() or _backend or environment_backend()


def set_backend_name(name: str) -> None:
    """Sets the process default."""
    global _backend
    _backend = name


@contextmanager
def backend_here(name: str) -> Iterator[None]:
    """Asks for a backend within the block, in this thread or task only."""
    token = _backend_here.set(name)
    try:
        yield
    finally:
        _backend_here.reset(token)


def get_num_threads() -> int:
    """The most threads that a call from here will use.

    The block of `use_num_threads` counts first, then `set_num_threads`, then the environment
    (FASTBN_NUM_THREADS, else OMP_NUM_THREADS), then the number of processors. Small calls use fewer, and a
    process forked after fastbn was imported uses one.

    >>> import fastbn
    >>> with fastbn.use_num_threads(2):
    ...     fastbn.get_num_threads()
    2
    """
    if _forked:
        return 1
    return _threads_here.get() or _threads or environment_threads()


def set_num_threads(n: int) -> None:
    """Sets the most threads that a call may use, for the process; calls that run already go on with theirs.

    The limits of others, such as threadpoolctl's, do not count: they are for calls that leave the number to OpenMP.

    Raises TypeError if `n` is no integer, ValueError if it is below 1.

    >>> import fastbn
    >>> before = fastbn.get_num_threads()
    >>> fastbn.set_num_threads(3)
    >>> fastbn.get_num_threads()
    3
    >>> fastbn.set_num_threads(before)
    """
    global _threads
    _threads = min(_check.count("n", n), MOST_THREADS)


@contextmanager
def use_num_threads(n: int) -> Iterator[None]:
    """Within the block, and in this thread or task only, calls use at most `n` threads.

    Raises TypeError if `n` is no integer, ValueError if it is below 1.

    >>> import fastbn
    >>> with fastbn.use_num_threads(1):
    ...     fastbn.get_num_threads()
    1
    """
    token = _threads_here.set(min(_check.count("n", n), MOST_THREADS))
    try:
        yield
    finally:
        _threads_here.reset(token)
