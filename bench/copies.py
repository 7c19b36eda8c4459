"""What does a copy of the same bytes cost? np.copyto, on as many threads as the pass has, is the yardstick."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat

import numpy as np

from .problem import Array, Clock, Contestant, Problem

NAME = "copy"

# With fewer bytes per thread, calling the threads would take longer than copying, so smaller arrays use fewer threads.
LEAST_BYTES_PER_THREAD = 1 << 16

Part = tuple[Array, Array]


class _Team:
    """Threads that sleep until there is a block of copies to make, and then work in parallel.

    In a block, each thread copies its own part a number of times, without waiting for the others in between. The cost
    of starting and joining the threads is therefore paid once per block, and the yardstick is the time of the copies
    alone. np.copyto releases the GIL.
    """

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts
        self._spans = [(0, 0)] * len(parts)
        self._block: tuple[int, Clock] | None = None
        self._start, self._end = threading.Barrier(len(parts)), threading.Barrier(len(parts))
        for i in range(1, len(parts)):
            threading.Thread(target=self._serve, args=(i,), daemon=True).start()

    def _copy(self, i: int, calls: int, clock: Clock) -> None:
        target, source = self._parts[i]
        start = clock()
        for _ in repeat(None, calls):
            np.copyto(target, source)
        self._spans[i] = (start, clock())
        self._end.wait()

    def _serve(self, i: int) -> None:
        while True:
            self._start.wait()
            if self._block is None:
                return
            self._copy(i, *self._block)

    def run(self, calls: int, clock: Clock = time.perf_counter_ns) -> int:
        """Runs a block, and returns the nanoseconds from the first thread's start to the last thread's end."""
        self._block = (calls, clock)
        self._start.wait()
        self._copy(0, calls, clock)
        starts, ends = zip(*self._spans, strict=True)
        return int(max(ends) - min(starts))

    def dismiss(self) -> None:
        self._block = None
        self._start.wait()


class _TeamCopy(Contestant):
    def __init__(self, team: _Team) -> None:
        super().__init__(name=NAME, call=partial(team.run, 1), results=lambda _: ())
        self._team = team

    def seconds(self, calls: int, clock: Clock) -> float:
        return self._team.run(calls, clock) / calls / 1e9


@contextmanager
def yardstick(problem: Problem, threads: int) -> Iterator[Contestant]:
    """A contestant that copies x to `out` with this number of threads."""
    threads = max(1, min(threads, problem.x.nbytes // LEAST_BYTES_PER_THREAD))
    if threads == 1:
        yield Contestant(name=NAME, call=partial(np.copyto, problem.out, problem.x), results=lambda _: ())
        return
    targets, sources = (np.array_split(a.reshape(-1), threads) for a in (problem.out, problem.x))
    team = _Team(list(zip(targets, sources, strict=True)))
    try:
        yield _TeamCopy(team)
    finally:
        team.dismiss()
