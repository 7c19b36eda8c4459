"""What does batch norm change when a small network trains? Compares three networks, with and without it, on digits.

All numbers and sentences come from the training runs, and none is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from .networks import KINDS, Array, Data, Job, Kind, Run, extra, seconds_per_step
from .precision import METHODS, Precision

CHANCE = 10.0
"""The accuracy of a guess among ten digits, in percent. A network that learns nothing ends near it."""
TRAINS = 80.0
"""A network counts as trained if its test accuracy at the end, in percent, is at least this."""
GOOD = 95.0
SMALL_BATCH = 2


@dataclass(frozen=True)
class Plan:
    """How much to run; `length` multiplies the steps of each network."""

    seeds: int = 5
    length: float = 1.0
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    scales: tuple[float, ...] = (0.03, 1.0, 3.0, 30.0)
    small_batch_rates: tuple[float, ...] = (0.001, 0.003, 0.01)
    small_batch_steps: int = 512


FULL = Plan()
QUICK = Plan(2, 0.2, (0.1, 1.0), (1.0, 3.0), (0.003,), 256)


def median(values: Any) -> Array:
    """The median over the last axis. Of an even number of values it is the lower of the middle two, not their mean."""
    ordered = np.sort(values, axis=-1)
    return np.asarray(ordered[..., (ordered.shape[-1] - 1) // 2])


@dataclass(frozen=True)
class Spread:
    """The median and the range over the seeds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = np.array(list(values))
        return cls(float(median(found)), float(found.min()), float(found.max()))

    def text(self, show: Callable[[float], str] = "{:.1f}".format) -> str:
        median, low, high = show(self.median), show(self.low), show(self.high)
        return median if low == high else f"{median} ({low}-{high})"


@dataclass(frozen=True)
class Variant:
    """A network without or with batch norm. The accuracies are arrays (learning rate, seed) and (scale, seed)."""

    by_rate: Array
    by_scale: Array
    largest_rate: Spread
    gradient_norm: Spread
    seconds_per_step: float


@dataclass(frozen=True)
class Side:
    """One column of the table: a network at one learning rate."""

    rate: float
    curves: Array
    accuracy: Spread
    steps_to_good: Spread
    steps_to_plain: Spread
    times_fewer: Spread


@dataclass(frozen=True)
class Comparison:
    """A network without batch norm, and with it at the same learning rate and at its own best."""

    kind: Kind
    checkpoints: Array
    without: Variant
    with_norm: Variant
    plain: Side
    same_rate: Side
    own_rate: Side

    @property
    def plain_trains(self) -> bool:
        return self.plain.accuracy.median >= TRAINS

    @property
    def cost(self) -> float:
        """The time of a step with batch norm over that without."""
        return self.with_norm.seconds_per_step / self.without.seconds_per_step


class Experiment:
    """The jobs of a plan, and the comparisons that follow from their runs."""

    def __init__(self, plan: Plan, data: Data) -> None:
        self.plan = plan
        self.data = data
        self.runs: dict[Job, Run] = {}

    def _job(self, kind: str, norm: bool, rate: float, scale: float = 1.0) -> Job:
        return Job(kind, norm, rate, max(1, round(self.plan.length * KINDS[kind].steps)), scale)

    def _small_batch(self, norm: bool, rate: float) -> Job:
        return Job("shallow", norm, rate, self.plan.small_batch_steps, batch=SMALL_BATCH)

    def _seeds(self, job: Job) -> list[Job]:
        return [replace(job, seed=seed) for seed in range(self.plan.seeds)]

    def _runs(self, job: Job) -> list[Run]:
        return [self.runs[each] for each in self._seeds(job)]

    def _finals(self, job: Job) -> list[float]:
        return [100 * float(run.curve[-1]) for run in self._runs(job)]

    def _best(self, jobs: Iterable[Job]) -> Job:
        """The job with the best validation accuracy; of several, the one with the largest learning rate."""
        return max(jobs, key=lambda job: (median([run.validation for run in self._runs(job)]), job.rate))

    def _best_of_rates(self, kind: str, norm: bool) -> Job:
        return self._best(self._job(kind, norm, rate) for rate in self.plan.rates)

    def _trains(self, job: Job) -> bool:
        return bool(median(self._finals(job)) >= TRAINS)

    def _rate(self, kind: str, norm: bool) -> float:
        """The best learning rate. If the plain network trains at no rate, its rate is the best one of batch norm."""
        best = self._best_of_rates(kind, norm)
        return best.rate if norm or self._trains(best) else self._best_of_rates(kind, True).rate

    def _sides(self, kind: str) -> list[Job]:
        """The jobs without batch norm, with it at the same rate, and with it at its own best rate."""
        plain, own = self._rate(kind, False), self._rate(kind, True)
        sides = (False, plain), (True, plain), (True, own)
        return [replace(self._job(kind, norm, rate), curve=True) for norm, rate in sides]

    def _scaled(self, kind: str, norm: bool, scale: float) -> list[Job]:
        """The jobs with this scale: at the best rate of scale 1, or at every rate if none trains with scale 1."""
        best = self._best_of_rates(kind, norm)
        rates = (best.rate,) if self._trains(best) else self.plan.rates
        return [self._job(kind, norm, rate, scale) for rate in rates]

    def rate_jobs(self) -> list[Job]:
        """The jobs of the first round: each learning rate, and the small batches."""
        jobs = [self._job(*each) for each in product(KINDS, (False, True), self.plan.rates)]
        jobs += [self._small_batch(norm, rate) for norm in (False, True) for rate in self.plan.small_batch_rates]
        return [each for job in jobs for each in self._seeds(job)]

    def other_jobs(self) -> list[Job]:
        """The jobs of the second round, which depend on the first: learning curves, and other initial weights."""
        jobs = [job for kind in KINDS for job in dict.fromkeys(self._sides(kind))]
        scales = [scale for scale in self.plan.scales if scale != 1]
        for kind, norm, scale in product(KINDS, (False, True), scales):
            jobs += self._scaled(kind, norm, scale)
        return [each for job in jobs for each in self._seeds(job)]

    def _variant(self, kind: str, norm: bool, seconds: float) -> Variant:
        rates = self.plan.rates
        by_rate = np.array([self._finals(self._job(kind, norm, rate)) for rate in rates])
        largest = (np.array(rates)[:, np.newaxis] * (by_rate >= TRAINS)).max(axis=0)
        return Variant(
            by_rate,
            np.array([self._finals(self._best(self._scaled(kind, norm, scale))) for scale in self.plan.scales]),
            Spread.of(largest),
            Spread.of(run.gradient_norm for run in self._runs(self._job(kind, norm, rates[0]))),
            seconds,
        )

    def _side(self, plain: Job, job: Job) -> Side:
        plain_curves, curves = (100 * np.array([run.curve for run in self._runs(each)]) for each in (plain, job))
        points = job.checkpoints()
        target = plain_curves[:, -1]
        steps = _first_reached(points, curves, target)
        return Side(
            job.rate,
            curves,
            Spread.of(curves[:, -1]),
            Spread.of(_first_reached(points, curves, np.full_like(target, GOOD))),
            Spread.of(steps),
            Spread.of(_first_reached(points, plain_curves, target) / steps),
        )

    def comparison(self, kind: str) -> Comparison:
        seconds = seconds_per_step(kind, self.data)
        plain, same, own = self._sides(kind)
        return Comparison(
            KINDS[kind],
            np.array(plain.checkpoints()),
            self._variant(kind, False, seconds[0]),
            self._variant(kind, True, seconds[1]),
            self._side(plain, plain),
            self._side(plain, same),
            self._side(plain, own),
        )

    def small_batches(self) -> tuple[Spread, Spread]:
        """The shallow network's accuracy with tiny batches, without and with batch norm, each at its best rate."""
        found = [
            Spread.of(self._finals(self._best(self._small_batch(norm, rate) for rate in self.plan.small_batch_rates)))
            for norm in (False, True)
        ]
        return found[0], found[1]

    def small_batches_by_rate(self) -> tuple[Array, Array]:
        """The same at each rate: arrays (learning rate, seed), without and with batch norm."""
        rates = self.plan.small_batch_rates
        found = [np.array([self._finals(self._small_batch(norm, rate)) for rate in rates]) for norm in (False, True)]
        return found[0], found[1]


def _first_reached(points: list[int], curves: Array, targets: Array) -> Array:
    """For each seed, the first checkpoint with an accuracy of at least its target; infinity if there is none."""
    reached = curves >= targets[:, np.newaxis]
    return np.where(reached.any(axis=1), np.array(points)[reached.argmax(axis=1)], np.inf)


def _steps_text(steps: float) -> str:
    return f"{steps:.0f}" if np.isfinite(steps) else "never"


def _fewer_text(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio else "never"


def _rate_text(rate: float) -> str:
    return f"{rate:g}" if rate else "none"


def _largest_text(variant: Variant, plan: Plan) -> str:
    beyond = variant.largest_rate.median == plan.rates[-1]
    return f"{'at least ' if beyond else ''}{variant.largest_rate.text(_rate_text)}"


def _norm_text(norm: float) -> str:
    return f"{norm:.1g}" if norm >= 0.01 else f"{norm:.0e}".replace("e-0", "e-")


def _trained(variant: Variant, plan: Plan) -> list[float]:
    """The scales of the initial weights at which the median seed trains."""
    medians = median(variant.by_scale)
    return [scale for scale, median in zip(plan.scales, medians, strict=True) if median >= TRAINS]


def _listed(scales: Iterable[float]) -> str:
    return ", ".join(f"{scale:g}" for scale in scales) or "none"


def _rows(c: Comparison, plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """The table's rows: a label, and cells for plain, batch norm at the same rate, and at its own best rate."""

    def of_sides(label: str, show: Callable[[Side], str]) -> tuple[str, str, str, str]:
        return label, show(c.plain), show(c.same_rate), show(c.own_rate)

    def of_variants(label: str, show: Callable[[Variant], str]) -> tuple[str, str, str, str]:
        return label, show(c.without), "", show(c.with_norm)

    yield of_sides("learning rate", lambda side: f"{side.rate:g}")
    yield of_sides("test accuracy, %", lambda side: side.accuracy.text())
    yield of_sides(f"steps to {GOOD:.0f} %", lambda side: side.steps_to_good.text(_steps_text))
    if c.plain_trains:
        yield of_sides("steps to plain's end", lambda side: side.steps_to_plain.text(_steps_text))
        yield of_sides("  times fewer", lambda side: "" if side is c.plain else side.times_fewer.text(_fewer_text))
    yield of_variants("largest rate to train", lambda variant: _largest_text(variant, plan))
    yield of_variants("initial scales to train", lambda variant: _listed(_trained(variant, plan)))
    yield of_variants("first gradient's norm", lambda variant: variant.gradient_norm.text(_norm_text))
    yield of_variants("microseconds a step", lambda variant: f"{1e6 * variant.seconds_per_step:.0f}")


def in_steps(side: Side) -> str:
    """In words, how many steps it took to reach plain's accuracy at the end, compared with plain."""
    ratio = side.times_fewer.median
    if ratio == 0:
        return "not reached"
    if 0.95 < ratio < 1.05:
        return "as many"
    return f"{ratio:.1f} times fewer" if ratio > 1 else f"{1 / ratio:.1f} times more"


def plain_fails(c: Comparison) -> str:
    best = float(median(c.without.by_rate).max())
    return f"stays at chance ({CHANCE:.0f} %)" if best < 2 * CHANCE else f"does not train (best: {best:.0f} %)"


def effects(comparisons: list[Comparison]) -> Iterator[str]:
    """What batch norm changed, in a sentence for each network, and the published figure to compare it with."""
    for c in comparisons:
        if c.plain_trains:
            told = f"{in_steps(c.own_rate)} at batch norm's own best learning rate, {in_steps(c.same_rate)} at plain's"
            if c.own_rate.rate == c.plain.rate:
                told = f"{in_steps(c.own_rate)} with batch norm, whose best learning rate is the same"
            yield f"{c.kind.title}, steps to the accuracy that plain ends with: {told}."
        else:
            larger = c.with_norm.gradient_norm.median / c.without.gradient_norm.median
            yield (
                f"{c.kind.title}: plain {plain_fails(c)} at every learning rate tried; with batch norm it ends at "
                f"{c.own_rate.accuracy.median:.1f} %. The first layer's gradient starts {larger:,.0f} times as large."
            )
    yield (
        "Published: 14 times fewer steps, for Inception on ImageNet at 5 times the learning rate (Ioffe & Szegedy "
        "2015, section 4.2)."
    )


def _limits_of(c: Comparison, plan: Plan) -> Iterator[str]:
    own, plain = c.own_rate.accuracy, c.plain.accuracy
    if c.plain_trains:
        if own.low <= plain.high:
            verdict = "no gain" if own.median <= plain.median else "a gain within the spread of the seeds"
            yield f"at the end {own.median:.1f} % with, {plain.median:.1f} % without: {verdict}."
        if c.same_rate.times_fewer.median < 1 and c.own_rate.rate != c.plain.rate:
            yield f"steps to the accuracy that plain ends with, at plain's learning rate: {in_steps(c.same_rate)}."
    else:
        ends = median(c.without.by_scale)
        if ends.max() >= 2 * CHANCE:
            scale = plan.scales[int(ends.argmax())]
            yield f"initial weights {scale:g} times as large help plain too: it ends at {ends.max():.1f} %."
    faster = c.own_rate.times_fewer.median / c.cost
    if c.cost > 1.05:
        verdict = f"{faster:.1f} times faster" if faster > 1.05 else "no faster"
        clock = f"; with {in_steps(c.own_rate)} of them, {verdict} by the clock" if c.plain_trains and faster else ""
        yield f"a step takes {c.cost:.1f} times as long{clock}."
    if lost := [scale for scale in _trained(c.without, plan) if scale not in _trained(c.with_norm, plan)]:
        yield f"with initial weights {_listed(lost)} times as large, plain trains and batch norm does not."


def limits(comparisons: list[Comparison], plan: Plan, small: tuple[Spread, Spread]) -> Iterator[str]:
    """Where batch norm did not help in these runs."""
    for c in comparisons:
        for sentence in _limits_of(c, plan):
            yield f"{c.kind.title}: {sentence}"
    plain, norm = small
    verdict = "it does harm" if norm.median < plain.median else "no harm here"
    yield (
        f"Batches of {SMALL_BATCH}, {KINDS['shallow'].title}, {plan.small_batch_steps} steps: {norm.text()} % with, "
        f"{plain.text()} % without: {verdict}."
    )


def _ulp_text(ulp: float) -> str:
    if not np.isfinite(ulp):
        return "not finite"
    if ulp >= 1000:
        return f"{ulp:.0e}".replace("e+0", "e")
    return f"{ulp:.1g}" if ulp < 1 else f"{ulp:.0f}"


def exactness(found: list[Precision]) -> Iterator[str]:
    """How accurate and how fast y is, in a sentence for each mean."""
    for p in found:
        errors = "; ".join(f"{METHODS[name]} {_ulp_text(p.ulp[name])}" for name in METHODS)
        faster = p.seconds["two passes"] / p.seconds["fastbn"]
        ratio = f"{faster:.1f} times as fast" if faster >= 1 else f"{1 / faster:.1f} times as slow"
        yield f"Mean {p.offset:g}: {errors}; fastbn is {ratio} as mean and var."


def report(
    comparisons: list[Comparison],
    plan: Plan,
    small: tuple[Spread, Spread],
    precision: list[Precision],
    console: Any,
) -> None:
    rich = extra("rich.table")
    table = rich.Table(
        box=extra("rich.box").HORIZONTALS,
        padding=(0, 0, 0, 1),
        title="8 x 8 handwritten digits, with and without batch norm",
        caption=f"seeds: {plan.seeds}, as median (lowest-highest); to train is to end at {TRAINS:.0f} % or better",
    )
    table.add_column("", no_wrap=True)
    for heading in ("plain", "batch norm,\nsame rate", "batch norm,\nown best rate"):
        table.add_column(heading, justify="right")
    for c in comparisons:
        table.add_section()
        table.add_row(f"[bold]{c.kind.title}[/bold]", f"{c.checkpoints[-1]} steps")
        for row in _rows(c, plan):
            table.add_row(*row)
    console.print(table)
    for heading, sentences in (
        ("What batch norm changed", effects(comparisons)),
        ("Where it did not help, and what it cost", limits(comparisons, plan, small)),
        ("Error of y (median, in units of its last place) beside float32 formulas in NumPy", exactness(precision)),
    ):
        grid = rich.Table.grid(padding=(0, 1))
        for sentence in sentences:
            grid.add_row("-", sentence)
        console.print(f"\n[bold]{heading}[/bold]", grid, sep="\n")
