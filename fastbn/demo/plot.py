"""How is the picture of the demo drawn? One column for each network, and a row for what batch norm does to numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from .networks import Array, extra
from .precision import METHODS, Precision
from .report import CHANCE, SMALL_BATCH, Comparison, Plan, in_steps, median, plain_fails

COLOURS = {"plain": "#d9730d", "same": "#7fb2e5", "own": "#17498f"}
COLOURS |= {"one pass": "#a83232", "two passes": "#8a8a8a", "fastbn": "#2a7f3e"}


def _band(axes: Any, x: Any, values: Array, name: str, **style: Any) -> None:
    """Draws the median of values (x, seed) as a line, and their range as a band."""
    axes.fill_between(x, values.min(axis=1), values.max(axis=1), color=COLOURS[name], alpha=0.2, linewidth=0)
    axes.plot(x, median(values), color=COLOURS[name], linewidth=2, **style)


def _headline(c: Comparison) -> str:
    if c.plain_trains:
        return f"steps to plain's end accuracy,\nwith batch norm: {in_steps(c.own_rate)}"
    return f"plain {plain_fails(c)};\nbatch norm ends at {c.own_rate.accuracy.median:.0f} %"


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


def _plot_networks(grid: Any, comparisons: list[Comparison], plan: Plan) -> None:
    """Draws learning curves, and below them the accuracy at the end by learning rate and by scale of the weights."""
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


def _plot_small_batches(axes: Any, plan: Plan, by_rate: tuple[Array, Array]) -> None:
    """Draws the accuracy of the shallow network, trained with batches of 2, by learning rate."""
    for values, name in zip(by_rate, ("plain", "own"), strict=True):
        _band(axes, plan.small_batch_rates, values, name, marker="o", markersize=4)
    axes.set(xscale="log", xlabel="learning rate", xticks=plan.small_batch_rates, ylim=(0, 103))
    axes.set_ylabel("accuracy at the end, %")
    axes.set_title(f"Batches of {SMALL_BATCH}, shallow network", fontweight="bold")


def _plot_errors(axes: Any, found: list[Precision]) -> None:
    """Draws the error of y by the mean of the data. Where a formula gives no finite numbers, a cross is at the top."""
    top = 10 * max(ulp for p in found for ulp in p.ulp.values() if np.isfinite(ulp))
    places = range(len(found))
    for name, label in METHODS.items():
        ulps = np.array([p.ulp[name] for p in found])
        drawn = np.where(np.isfinite(ulps), ulps, np.nan)
        axes.plot(places, drawn, "o-", color=COLOURS[name], markersize=5, linewidth=2, label=label)
        for place in np.flatnonzero(~np.isfinite(ulps)):
            axes.plot(place, top, "X", color=COLOURS[name], markersize=10)
            axes.annotate("not finite", (place, top), (-10, 0), textcoords="offset points", ha="right", va="center")
    axes.set(yscale="log", ylabel="median error, ulp", xlabel="mean of the data", xlim=(-0.3, len(found) - 0.7))
    axes.set_xticks(list(places), [f"{p.offset:g}".replace("e+0", "e") for p in found])
    axes.set_title("Error of y, float32", fontweight="bold")


def _plot_times(axes: Any, found: list[Precision]) -> None:
    """Draws the time of a call for each formula and mean."""
    width = 0.8 / len(METHODS)
    for i, (name, label) in enumerate(METHODS.items()):
        places = np.arange(len(found)) + (i - (len(METHODS) - 1) / 2) * width
        axes.bar(places, [1e3 * p.seconds[name] for p in found], width, color=COLOURS[name], label=label)
    axes.set_xticks(range(len(found)), [f"{p.offset:g}".replace("e+0", "e") for p in found])
    axes.set(ylabel="milliseconds", xlabel="mean of the data")
    axes.set_title("Time on this machine, 1 thread", fontweight="bold")


def plot(
    comparisons: list[Comparison],
    plan: Plan,
    small: tuple[Array, Array],
    precision: list[Precision],
    output: str,
) -> None:
    """Draws the picture, and writes it to a file."""
    figure = extra("matplotlib.figure").Figure(figsize=(12, 13.6), dpi=120)
    extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    sides = {"left": 0.065, "right": 0.985}
    space = {"bottom": 0.365, "top": 0.92, "wspace": 0.06, "hspace": 0.28, **sides}
    grid = figure.subplots(3, len(comparisons), sharey="row", height_ratios=(1.8, 1, 1), gridspec_kw=space)
    _plot_networks(grid, comparisons, plan)
    last = figure.add_gridspec(1, 3, bottom=0.085, top=0.26, wspace=0.25, **sides)
    small_axes, errors, times = (figure.add_subplot(last[0, i]) for i in range(3))
    _plot_small_batches(small_axes, plan, small)
    for axes in (*grid.flat, small_axes):
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.axhline(CHANCE, color="#888888", linewidth=1, linestyle=":")
    _plot_errors(errors, precision)
    _plot_times(times, precision)
    for axes in (*grid.flat, small_axes, errors, times):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Learning to read handwritten digits, with and without batch norm (seeds: {plan.seeds}; median and range)",
        fontsize=14,
        y=0.985,
    )
    words = {"loc": "center", "ncol": 3, "frameon": False}
    figure.legend(*grid[0, 0].get_legend_handles_labels(), bbox_to_anchor=(0.5, 0.312), **words)
    figure.legend(*errors.get_legend_handles_labels(), bbox_to_anchor=(0.5, 0.025), **words)
    figure.savefig(output)
