"""How many threads may calls use? What use_num_threads, set_num_threads or the environment says, in this order.

How many of these a call uses is decided in `_backends`, where the backend is known.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from ..call import checks
from . import cgroup

MOST_THREADS = 1024
"""FBN_MOST_THREADS of fastbn.h. GNU OpenMP ends the process if it cannot start a thread."""

_threads: int | None = None
_threads_here: ContextVar[int | None] = ContextVar("fastbn_num_threads", default=None)
_forked = False


def _after_fork() -> None:
    """A forked child does not have its parent's OpenMP threads, but GNU OpenMP would wait for them forever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def in_forked_child() -> bool:
    """Whether this process was forked after fastbn was imported; such a process runs on one thread."""
    return _forked


def asked() -> int:
    """The number of threads that was requested, or else the default."""
    return _threads_here.get() or _threads or _default


def _of_environment() -> int:
    """FASTBN_NUM_THREADS, else OMP_NUM_THREADS (the first number in it), else the number of processors."""
    value = os.environ.get("FASTBN_NUM_THREADS")
    if value:
        digits = value.strip()
        number = int(digits) if digits.isdecimal() and len(digits) < 20 else 0
        if not 1 <= number <= MOST_THREADS:
            raise ValueError(f"FASTBN_NUM_THREADS: got {value!r}; allowed: {_ALLOWED}")
        return number
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if value.isdecimal() and value.strip("0"):
        return min(int(value), MOST_THREADS) if len(value) < 20 else MOST_THREADS
    return _processors()


def _processors() -> int:
    """How many processors the process may use, by its affinity and the quota of its container."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affinity, _quota or affinity, MOST_THREADS)


_ALLOWED = f"a positive integer up to {MOST_THREADS}"
_quota = cgroup.quota()
_default = _of_environment()


def why() -> str:
    """Where the number comes from, for show_config()."""
    if _threads_here.get() or _threads:
        return "asked for"
    for name in ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name):
            return name
    quota = "" if _quota is None else f"; a quota leaves it the time of {_quota}"
    return f"the processors that this process may use{quota}"


def _number(n: object) -> int:
    return checks.between("n", n, 1, MOST_THREADS)


def set_num_threads(n: int) -> None:
    """Sets the most threads that a call may use, for the whole process; calls that are running do not change theirs.

    n may exceed the number of processors. See `get_num_threads` for other limits.

    Raises TypeError if `n` is not an integer, ValueError if it is not from 1 to 1024.

    >>> import fastbn
    >>> before = fastbn.get_num_threads()
    >>> fastbn.set_num_threads(1)
    >>> fastbn.get_num_threads()
    1
    >>> fastbn.set_num_threads(before)
    """
    global _threads
    _threads = _number(n)


def use_num_threads(n: int) -> AbstractContextManager[None]:
    """Within the block, and in this thread or task only, calls use at most `n` threads.

    Raises TypeError if `n` is not an integer, ValueError if it is not from 1 to 1024.

    >>> import fastbn
    >>> with fastbn.use_num_threads(1):
    ...     fastbn.get_num_threads()
    1
    """
    return _here(_number(n))


@contextmanager
def _here(n: int) -> Iterator[None]:
    token = _threads_here.set(n)
    try:
        yield
    finally:
        _threads_here.reset(token)
