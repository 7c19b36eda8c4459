"""Is freed memory kept for the next call? Sets glibc's allocator to keep it, or to behave as it does by default."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4

# By default, a block larger than the mmap threshold is mapped again for each allocation, and each of its pages faults.
# The threshold starts at 128 KiB and grows with the blocks that are freed, up to 32 MiB; the trim threshold is twice as
# large. These are the values that a process which works on large arrays soon has.
DEFAULT_MMAP_THRESHOLD = 32 << 20
DEFAULT_MMAP_MAX = 1 << 16

PAGE = 4096
"""The bytes of the smallest page that any Linux has; with larger ones there are fewer faults."""

MOST_CALLS = 12


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def available() -> bool:
    """Whether the C library is glibc."""
    return sys.platform.startswith("linux") and hasattr(_libc(), "gnu_get_libc_version")


def _as_users_have_it() -> None:
    _libc().mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
    _libc().mallopt(M_MMAP_THRESHOLD, DEFAULT_MMAP_THRESHOLD)
    _libc().mallopt(M_TRIM_THRESHOLD, 2 * DEFAULT_MMAP_THRESHOLD)
    _libc().malloc_trim(0)


@contextmanager
def freed_memory_kept(call: Callable[[], Any], size: int) -> Iterator[None]:
    """Returns no freed memory to the system, as with large MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_.

    glibc looks for more room than an aligned result has, so that some calls pass before one lies where an earlier one
    was. They are made here, until this is so for two in a row. A result has `size` bytes.
    """
    _libc().mallopt(M_MMAP_MAX, 0)
    _libc().mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        in_a_row, few = 0, size // PAGE // 10
        for _ in range(MOST_CALLS):
            in_a_row = in_a_row + 1 if page_faults(call) <= few else 0
            if in_a_row == 2:
                break
        yield
    finally:
        _as_users_have_it()


def page_faults(call: Callable[[], Any]) -> int:
    """How many pages a call touches for the first time."""
    resource = importlib.import_module("resource")  # which Windows does not have
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
