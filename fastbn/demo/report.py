"""What does batch norm change when a small network trains? Compares three networks, with and without it, on digits.

    fastbn demo              # or python -m fastbn demo; needs pip install "fastbn[demo]"

All numbers and sentences that it prints come from the training runs of that call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from .._backends import get_num_threads
from ..call import checks
from .networks import KINDS, Array, Data, Job, Kind, Run, executor, extra, load_data, seconds_per_step

CHANCE = 10.0
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


def _median(values: Any) -> Array:
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
        return cls(float(_median(found)), float(found.min()), float(found.max()))

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
        return max(jobs, key=lambda job: (_median([run.validation for run in self._runs(job)]), job.rate))

    def _best_of_rates(self, kind: str, norm: bool) -> Job:
        return self._best(self._job(kind, norm, rate) for rate in self.plan.rates)

    def _trains(self, job: Job) -> bool:
        return bool(_median(self._finals(job)) >= TRAINS)

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
    medians = _median(variant.by_scale)
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


def _steps(side: Side) -> str:
    """In words, how many steps it took to reach plain's accuracy at the end, compared with plain."""
    ratio = side.times_fewer.median
    if ratio == 0:
        return "not reached"
    if 0.95 < ratio < 1.05:
        return "as many"
    return f"{ratio:.1f} times fewer" if ratio > 1 else f"{1 / ratio:.1f} times more"


def _plain_fails(c: Comparison) -> str:
    best = float(_median(c.without.by_rate).max())
    return f"stays at chance ({best:.0f} %)" if best < 2 * CHANCE else f"does not train (best: {best:.0f} %)"


def effects(comparisons: list[Comparison]) -> Iterator[str]:
    """What batch norm changed, in a sentence for each network, and the published figure to compare it with."""
    for c in comparisons:
        if c.plain_trains:
            told = f"{_steps(c.own_rate)} at batch norm's own best learning rate, {_steps(c.same_rate)} at plain's"
            if c.own_rate.rate == c.plain.rate:
                told = f"{_steps(c.own_rate)} with batch norm, whose best learning rate is the same"
            yield f"{c.kind.title}, steps to the accuracy that plain ends with: {told}."
        else:
            larger = c.with_norm.gradient_norm.median / c.without.gradient_norm.median
            yield (
                f"{c.kind.title}: plain {_plain_fails(c)} at every learning rate tried; with batch norm it ends at "
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
            yield f"steps to the accuracy that plain ends with, at plain's learning rate: {_steps(c.same_rate)}."
    else:
        ends = _median(c.without.by_scale)
        if ends.max() >= 2 * CHANCE:
            scale = plan.scales[int(ends.argmax())]
            yield f"initial weights {scale:g} times as large help plain too: it ends at {ends.max():.1f} %."
    faster = c.own_rate.times_fewer.median / c.cost
    if c.cost > 1.05:
        verdict = f"{faster:.1f} times faster" if faster > 1.05 else "no faster"
        clock = f"; with {_steps(c.own_rate)} of them, {verdict} by the clock" if c.plain_trains and faster else ""
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


def report(comparisons: list[Comparison], plan: Plan, small: tuple[Spread, Spread], console: Any) -> None:
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
    ):
        grid = rich.Table.grid(padding=(0, 1))
        for sentence in sentences:
            grid.add_row("-", sentence)
        console.print(f"\n[bold]{heading}[/bold]", grid, sep="\n")


COLOURS = {"plain": "#d9730d", "same": "#7fb2e5", "own": "#17498f"}


def _band(axes: Any, x: Any, values: Array, name: str, **style: Any) -> None:
    """Draws the median of values (x, seed) as a line, and their range as a band."""
    axes.fill_between(x, values.min(axis=1), values.max(axis=1), color=COLOURS[name], alpha=0.2, linewidth=0)
    axes.plot(x, _median(values), color=COLOURS[name], linewidth=2, **style)


def _headline(c: Comparison) -> str:
    if c.plain_trains:
        return f"steps to plain's end accuracy,\nwith batch norm: {_steps(c.own_rate)}"
    return f"plain {_plain_fails(c)};\nbatch norm ends at {c.own_rate.accuracy.median:.0f} %"


def _plot_curves(axes: Any, c: Comparison) -> None:
    """Draws the learning curves. The axis of accuracy is spaced by the logarithm of the error."""
    for side, name, label in (
        (c.plain, "plain", "plain"),
        (c.same_rate, "same", "batch norm, plain's learning rate"),
        (c.own_rate, "own", "batch norm, its own best learning rate"),
    ):
        _band(axes, c.checkpoints, side.curves.T, name, label=label)
    axes.set_yscale("function", functions=(lambda y: -np.log(101 - y), lambda z: 101 - np.exp(-z)))
    axes.set(ylim=(0, 100), yticks=(CHANCE, 50, 80, 90, 95, 98, 99))
    axes.set_title(f"{c.kind.title}\n", fontweight="bold")
    axes.text(0.5, 1.03, c.kind.layers, transform=axes.transAxes, ha="center", fontsize=9, color="#555555")
    axes.text(0.03, 0.97, _headline(c), transform=axes.transAxes, va="top", color=COLOURS["own"])


def plot(comparisons: list[Comparison], plan: Plan, output: str) -> None:
    """Draws learning curves, and below them the accuracy at the end by learning rate and by scale of the weights."""
    figure = extra("matplotlib.figure").Figure(figsize=(12, 10), dpi=120)
    extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    space = {"left": 0.06, "right": 0.985, "bottom": 0.095, "top": 0.895, "wspace": 0.06, "hspace": 0.28}
    grid = figure.subplots(3, len(comparisons), sharey="row", height_ratios=(1.8, 1, 1), gridspec_kw=space)
    for c, (curves, rates, scales) in zip(comparisons, grid.T, strict=True):
        _plot_curves(curves, c)
        for variant, name in ((c.without, "plain"), (c.with_norm, "own")):
            _band(rates, plan.rates, variant.by_rate, name, marker="o", markersize=4)
            _band(scales, plan.scales, variant.by_scale, name, marker="o", markersize=4)
    labels = ("step", "learning rate", "scale of the initial weights (best rate)")
    for axes in grid[1:].flat:
        axes.set_ylim(0, 103)
    heights = ("test accuracy, %", "accuracy at the end, %", "accuracy at the end, %")
    for row, x, y, ticks in zip(grid, labels, heights, ((3, 10, 30, 100), plan.rates, plan.scales), strict=True):
        row[0].set_ylabel(y)
        for axes in row:
            axes.set(xscale="log", xlabel=x, xticks=ticks)
            axes.minorticks_off()
            axes.xaxis.set_major_formatter("{x:g}")
            axes.axhline(CHANCE, color="#888888", linewidth=1, linestyle=":")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Learning to read handwritten digits, with and without batch norm (seeds: {plan.seeds}; median and range)",
        fontsize=14,
    )
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="lower center", ncol=3, frameon=False)
    figure.savefig(output)


def run(plan: Plan, output: str, workers: int) -> None:
    """Runs the plan in `workers` processes, prints the table and the conclusions, and writes the picture."""
    if not output.endswith(".png") or not os.path.isdir(os.path.dirname(os.path.abspath(output))):
        raise ValueError(f"output: got {output!r}; allowed: a file name that ends in .png, in a folder that exists")
    extra("matplotlib.figure")
    rich = extra("rich.progress")
    console = extra("rich.console").Console()
    experiment = Experiment(plan, load_data())
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
    with (
        rich.Progress(*columns, rich.TimeElapsedColumn(), console=console) as progress,
        executor(experiment.data, workers) as execute,
    ):
        for title, jobs in (("Learning rates", experiment.rate_jobs), ("Curves, weights", experiment.other_jobs)):
            wanted = jobs()
            task = progress.add_task(title, total=len(wanted))
            for job, found in execute(wanted):
                experiment.runs[job] = found
                progress.advance(task)
    comparisons = [experiment.comparison(kind) for kind in KINDS]
    report(comparisons, plan, experiment.small_batches(), console)
    plot(comparisons, plan, output)
    console.print(f"\nThe learning curves are in {output}.")


def main(quick: bool = False, seeds: int | None = None, output: str = "fastbn-demo.png") -> None:
    """The command `fastbn demo`. Quick runs use one process, since they take less time than others need to start."""
    plan = QUICK if quick else FULL
    if seeds is not None:
        plan = replace(plan, seeds=checks.count("seeds", seeds))
    run(plan, output, workers=1 if quick else min(get_num_threads(), 8))
