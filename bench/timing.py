"""How is a race run? Contestants take turns, in a new random order each round, until the time is spent."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .problem import Clock, Contestant

# A turn is one untimed call and then a block of timed calls. The untimed call brings back into the caches what earlier
# contestants have evicted, so that each contestant is measured with the caches as its own calls leave them: "warm". One
# untimed call is enough, since a second call finds the same state of the caches, whatever the size of the arrays. Small
# calls are timed in blocks of about a millisecond, ten thousand times the cost of reading the clock.
BLOCK_SECONDS = 1e-3

# After a parallel call, the threads of OpenMP and other pools spin for some milliseconds, on processors that the next
# contestant may need. After this pause they sleep, and the untimed call wakes the contestant's own threads.
PAUSE_SECONDS = 5e-3

MOST_SAMPLES = 101

LEAST_SECONDS = 1e-9


@dataclass(frozen=True)
class Budget:
    """How long a race lasts: about `seconds`, or longer if that is needed for `least` samples of each contestant."""

    seconds: float = 2.0
    least: int = 5


class _Ring:
    """The clock and the pause with which turns are taken."""

    def __init__(self, clock: Clock, pause: float, sleep: Callable[[float], None]) -> None:
        self.clock, self.pause, self.sleep = clock, pause, sleep

    def turn(self, contestant: Contestant, calls: int) -> float:
        """Runs a turn of a contestant, and returns the seconds per call."""
        with contestant.within():
            if self.pause:
                self.sleep(self.pause)
            contestant.call()
            return contestant.seconds(calls, self.clock)


@dataclass(frozen=True)
class Samples:
    """Seconds per call, by the number of the round in which they were taken."""

    by_round: dict[int, float]

    @property
    def median(self) -> float:
        return statistics.median(self.by_round.values())

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        if len(self.by_round) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.by_round.values(), n=4, method="inclusive")
        return (high - low) / self.median

    def over(self, other: Samples) -> float:
        """The median ratio of this time to the other's in the same round, so that drift affects both alike."""
        return statistics.median(t / other.by_round[r] for r, t in self.by_round.items() if r in other.by_round)


@dataclass
class _Entrant:
    contestant: Contestant
    calls: int
    samples: int

    def runs_in(self, number: int, rounds: int) -> bool:
        """Whether it has a sample in this round. Samples are spread evenly over the rounds."""
        return (number + 1) * self.samples // rounds > number * self.samples // rounds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _calls_in_a_block(contestant: Contestant, ring: _Ring) -> int:
    """How many calls fill a block. Short calls are tried ten in a row, because a single call may be an outlier."""
    for trial in (1, 10):
        calls = math.ceil(BLOCK_SECONDS / max(ring.turn(contestant, trial), LEAST_SECONDS))
        if calls < 10:
            break
    return calls


def _enter(contestants: Sequence[Contestant], budget: Budget, ring: _Ring) -> list[_Entrant]:
    """Shares out the time: slow contestants get fewer samples. The first, the yardstick, is in every round."""
    entrants = []
    for contestant in contestants:
        calls = _calls_in_a_block(contestant, ring)
        seconds = ring.pause + (calls + 1) * max(ring.turn(contestant, calls), LEAST_SECONDS)
        samples = math.floor(budget.seconds / len(contestants) / seconds)
        entrants.append(_Entrant(contestant, calls, min(MOST_SAMPLES, max(budget.least, samples))))
    entrants[0].samples = max(entrant.samples for entrant in entrants)
    return entrants


def race(
    contestants: Sequence[Contestant],
    budget: Budget,
    *,
    clock: Clock = time.perf_counter_ns,
    pause: float = 0.0,
    sleep: Callable[[float], None] = time.sleep,
    seed: int = 0,
) -> list[Samples]:
    """The samples of each contestant. The first is the yardstick by which the others are divided; it should be fast."""
    order, ring = random.Random(seed), _Ring(clock, pause, sleep)
    with _no_garbage_collection():
        entrants = _enter(contestants, budget, ring)
        taken: list[dict[int, float]] = [{} for _ in entrants]
        rounds = entrants[0].samples
        for number in range(rounds):
            turns = [i for i, entrant in enumerate(entrants) if entrant.runs_in(number, rounds)]
            order.shuffle(turns)
            for i in turns:
                taken[i][number] = ring.turn(entrants[i].contestant, entrants[i].calls)
    return [Samples(by_round) for by_round in taken]
