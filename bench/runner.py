"""What happens in a run? For each race, contestants are prepared, their results checked and their calls timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import fastbn

from . import limit, ours
from .copies import yardstick
from .problem import (
    TOLERANCE,
    Array,
    Contestant,
    Problem,
    Variant,
    disagreement,
    layouts_of,
    passes_of,
    variants_of,
)
from .rivals import Rival, lacks
from .rows import BASE, COPY, FASTBN, LIMIT, PEER, Row
from .shapes import Shape, written
from .timing import PAUSE_SECONDS, Budget, Samples, race

ARRAYS_KEPT = 3
"""How many sets of arrays of a shape and layout are kept: that of a variant, and those of its bases."""


@dataclass(frozen=True)
class Plan:
    """What is run: every combination of the fields that makes sense."""

    shapes: Sequence[Shape]
    passes: Sequence[str]
    layouts: tuple[str, ...]
    variants: Sequence[Variant]
    threads: Sequence[int]
    entrants: dict[str, tuple[str, str | None]]
    budget: Budget

    @property
    def races(self) -> int:
        """How many races there are."""
        kinds = (
            len(layouts_of(shape, self.layouts)) * len(passes_of(shape, self.passes, variant.mask))
            for shape in self.shapes
            for variant in variants_of(shape, self.variants)
        )
        return sum(kinds) * len(self.threads)


@dataclass
class _Entered:
    contestant: Contestant
    kind: str
    difference: float


@dataclass
class Runner:
    """Runs a plan against the rivals."""

    plan: Plan
    rivals: dict[str, Rival]
    _noted: dict[str, list[str]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """Contestants that failed and results that differ, each with the first race and the number of others."""
        return [
            f"{what} (in {races[0]}{f', and {len(races) - 1} more' if len(races) > 1 else ''})"
            for what, races in self._noted.items()
        ]

    def _note(self, what: str, where: str) -> None:
        self._noted.setdefault(what, []).append(where)

    def run(self, progress: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
        """Yields the rows of every race, in the plan's order. `progress` is called with each race before it starts."""
        plan = self.plan
        for threads in plan.threads:
            for rival in self.rivals.values():
                rival.set_threads(threads)
            with fastbn.use_num_threads(threads):
                for shape in plan.shapes:
                    for layout in layouts_of(shape, plan.layouts):
                        arrays = lru_cache(ARRAYS_KEPT)(partial(Problem, shape, layout))
                        for variant in variants_of(shape, plan.variants):
                            problem, *bases = (
                                arrays(one.dtype, one.strides).varied(one)
                                for one in (variant, *variant.bases().values())
                            )
                            named = dict(zip(variant.bases(), bases, strict=True))
                            yield from self._problem(problem, named, threads, progress)

    def _problem(
        self, problem: Problem, bases: Mapping[str, Problem], threads: int, progress: Callable[[str], None]
    ) -> Iterator[Row]:
        for pass_ in passes_of(problem.shape, self.plan.passes, problem.variant.mask):
            where = f"{pass_} {written(problem.shape)} {problem.layout} {problem.variant}, threads: {threads}"
            progress(where)
            entered = self._enter(problem, bases, pass_, where)
            if entered:
                loops = limit.contestants(problem, pass_, threads)
                with yardstick(bases.get("dense", problem), threads) as copy:
                    contestants = [copy, *(one.contestant for one in entered), *loops]
                    samples = race(contestants, self.plan.budget, pause=PAUSE_SECONDS if threads > 1 else 0.0)
                taken = dict(zip([loop.name for loop in loops], samples[len(samples) - len(loops) :], strict=True))
                parts = limit.fastest(pass_, taken) if loops else []
                yield from _rows(problem, pass_, threads, [_Entered(copy, COPY, 0.0), *entered], samples, parts)

    def _prepared(
        self, problem: Problem, bases: Mapping[str, Problem], pass_: str, where: str
    ) -> Iterator[tuple[str, Contestant]]:
        """Yields (kind, contestant), fastbn's first, since peers are checked against them. Failures become notes."""
        for base, version in {"": problem, **bases}.items():
            for name, entrant in self.plan.entrants.items():
                try:
                    yield BASE if base else FASTBN, ours.prepare(version, pass_, _named(name, base), *entrant)
                except NotImplementedError as error:
                    self._note(_refusal(name, error), where)
        # Where fastbn's results go does not matter to the peers, which take part once.
        once = problem.variant.result == self.plan.variants[0].result
        for title, rival in self.rivals.items() if once else ():
            lacking = lacks(title, problem.variant)
            if lacking:
                self._note(f"{title} is not timed with {lacking}", where)
                continue
            try:
                contestants = rival.prepare(problem, pass_)
            except Exception as error:  # a peer may raise anything
                self._note(_refusal(title, error), where)
                continue
            for contestant in contestants:
                yield PEER, contestant

    def _enter(self, problem: Problem, bases: Mapping[str, Problem], pass_: str, where: str) -> list[_Entered]:
        """Runs each contestant once and compares its result with the first of fastbn's. Empty if none of these runs."""
        entered: list[_Entered] = []
        reference: tuple[Array, ...] | None = None
        for kind, contestant in self._prepared(problem, bases, pass_, where):
            try:
                with contestant.within():
                    results = contestant.results(contestant.call())
            except Exception as error:  # a peer may raise anything
                if kind != PEER and not isinstance(error, NotImplementedError):
                    raise
                self._note(_refusal(contestant.name, error), where)
                continue
            if reference is None:
                if kind != FASTBN:
                    return []
                reference = tuple(result.copy() for result in results)
            difference = disagreement(results, reference) if kind != BASE else 0.0
            if difference > TOLERANCE[problem.dtype]:
                self._note(
                    f"{contestant.name}: its result differs", f"{where}: by {difference:.0e} of the largest value"
                )
            entered.append(_Entered(contestant, kind, difference))
        return entered


def _named(entrant: str, base: str) -> str:
    """The name of the contestant that runs a base of the variant; without a base, it is the entrant's name."""
    return f"{entrant}, {base}" if base else entrant


def _refusal(name: str, error: Exception) -> str:
    return f"{name} does not run: {type(error).__name__}: {error}".splitlines()[0]


def _rows(
    problem: Problem,
    pass_: str,
    threads: int,
    entered: Sequence[_Entered],
    samples: Sequence[Samples],
    limits: Sequence[Samples],
) -> Iterator[Row]:
    """The rows of a race. `limits` are what the limit is the sum of, if there is one."""
    copy, variant = samples[0], problem.variant
    finished = list(zip(entered, samples, strict=False))  # the loops of the limit, if any, are the last samples
    to_copy = {one.contestant.name: taken.over(copy) for one, taken in finished}
    kinds = {one.contestant.name: one.kind for one in entered}
    if limits:
        to_copy[LIMIT], kinds[LIMIT] = sum(taken.over(copy) for taken in limits), LIMIT
    shared = {"pass_": pass_, "layout": problem.layout, "shape": problem.shape, "threads": threads, **vars(variant)}

    def row(name: str, seconds: float, spread: float, count: int, **more: Any) -> Row:
        moved = 2 * problem.x.nbytes if kinds[name] == COPY else problem.bytes_moved(pass_)
        measured = {"seconds": seconds, "spread": spread, "samples": count, "bytes_moved": moved}
        others = _others(name, variant, kinds, to_copy)
        given = {**shared, **measured, **more, "gb_per_s": moved / seconds / 1e9, "others": others}
        return Row(contestant=name, kind=kinds[name], **given)

    for one, taken in finished:
        if one.kind != BASE:
            agrees = one.difference <= TOLERANCE[problem.dtype]
            answer = {"agrees": agrees, "difference": one.difference}
            yield row(one.contestant.name, taken.median, taken.spread, len(taken.by_round), **answer)
    if limits:
        least = min(len(taken.by_round) for taken in limits)
        yield row(LIMIT, sum(taken.median for taken in limits), max(taken.spread for taken in limits), least)


def _others(name: str, variant: Variant, kinds: Mapping[str, str], to_copy: Mapping[str, float]) -> dict[str, float]:
    """The times of others over this contestant's. All are relative to the copies of the same rounds."""
    found = {COPY: 1 / to_copy[name]}
    if kinds[name] != FASTBN:
        return found
    compared = [other for other, kind in kinds.items() if kind in (LIMIT, PEER)]
    found |= {other: to_copy[other] / to_copy[name] for other in compared}
    bases = {base: _named(name, base) for base in variant.bases()}
    return found | {base: to_copy[one] / to_copy[name] for base, one in bases.items() if one in to_copy}
