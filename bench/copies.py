"""What does a copy of the same bytes cost? The yardstick: np.copyto, split over as many threads as the pass has."""

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

# A thread that copies less than this would spend its time on being called; smaller arrays are copied by fewer threads.
LEAST_BYTES_A_THREAD = 1 << 16

Part = tuple[Array, Array]


class _Team:
    """Threads that wait, asleep, for a block of copies, and go through it side by side.

    A block is so many copies of one's own part in a row, with no meeting in between: what it costs to start and to
    join is paid once a block, so that the yardstick is the copy alone, and a hard one. copyto drops the GIL.
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
        """Nanoseconds from the first thread's start to the last one's end."""
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
    """The copy of x to `out` by so many threads."""
    threads = max(1, min(threads, problem.x.nbytes // LEAST_BYTES_A_THREAD))
    if threads == 1:
        yield Contestant(name=NAME, call=partial(np.copyto, problem.out, problem.x), results=lambda _: ())
        return
    targets, sources = (np.array_split(a.reshape(-1), threads) for a in (problem.out, problem.x))
    team = _Team(list(zip(targets, sources, strict=True)))
    try:
        yield _TeamCopy(team)
    finally:
        team.dismiss()
